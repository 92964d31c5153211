//! The scripts and the encoding of their arguments.

use std::sync::LazyLock;
use std::time::Duration;

use smallvec::SmallVec;

use crate::model::call::{Charge, ChargeRule};
use crate::model::checks::{added, needed};
use crate::model::id::ReservationId;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::Terms;
use crate::model::limits::ScopeLimits;

/// Parts that several scripts share. A script contains only the parts that it uses, because each call creates every
/// function of its script anew.
const LEAKY_BUCKET: &str = include_str!("scripts/leaky_bucket.lua");
const LEASES: &str = include_str!("scripts/leases.lua");
const RESERVATION: &str = include_str!("scripts/reservation.lua");

/// A script's text and the hash by which the server knows it.
pub(crate) struct Script {
    text: String,
    hash: String,
}

macro_rules! script {
    ($name:ident, $file:literal, $($part:ident),*) => {
        pub(crate) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(include_str!(concat!("scripts/", $file)), &[$($part),*]));
    };
}

script!(ACQUIRE, "acquire.lua", LEAKY_BUCKET, LEASES, RESERVATION);
script!(SETTLE, "settle.lua", LEAKY_BUCKET, LEASES, RESERVATION);
script!(RENEW, "renew.lua", LEAKY_BUCKET, LEASES, RESERVATION);
script!(MOVE_SLOT, "move_slot.lua", LEAKY_BUCKET, LEASES);
script!(RELEASE, "release.lua",);
script!(FREE_ORPHANS, "free_orphans.lua", LEAKY_BUCKET);
script!(CHARGE, "charge.lua", LEAKY_BUCKET);
script!(BIRTH, "birth.lua", LEAKY_BUCKET);
script!(USAGE, "usage.lua",);
script!(PEEK, "peek.lua", LEAKY_BUCKET, LEASES);

impl Script {
    fn new(source: &str, parts: &[&str]) -> Self {
        // The first line holds the flags of the script, so it must stay first.
        let (flags, body) = source.split_once('\n').unwrap_or((source, ""));
        let text = format!("{flags}\n{}{body}", parts.concat());
        let hash = ::redis::Script::new(&text).get_hash().to_owned();
        Self { text, hash }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn hash(&self) -> &str {
        &self.hash
    }
}

/// The arguments in the order in which scripts read them: first all numbers in one string of little-endian doubles,
/// which a script decodes in a few steps, then the texts. Every number is whole and below 2^53.
#[derive(Default)]
pub(crate) struct Args {
    numbers: Vec<u8>,
    texts: Vec<u8>,
    /// The end of each text.
    ends: SmallVec<[usize; 8]>,
}

impl Args {
    /// The arguments as they are sent.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let texts = starts.zip(&self.ends).map(|(from, to)| &self.texts[from..*to]);
        std::iter::once(self.numbers.as_slice()).chain(texts)
    }

    /// The number of arguments.
    pub(crate) fn len(&self) -> usize {
        1 + self.ends.len()
    }

    /// The size of the arguments, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.numbers.len() + self.texts.len()
    }

    pub(crate) fn number(&mut self, value: f64) -> &mut Self {
        self.numbers.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn int(&mut self, value: u64) -> &mut Self {
        self.number(value as f64)
    }

    pub(crate) fn flag(&mut self, value: bool) -> &mut Self {
        self.number(f64::from(u8::from(value)))
    }

    pub(crate) fn id(&mut self, id: ReservationId) -> &mut Self {
        let mut hex = [0; uuid::fmt::Simple::LENGTH];
        self.texts.extend_from_slice(id.simple().encode_lower(&mut hex).as_bytes());
        self.ends.push(self.texts.len());
        self
    }

    /// A text.
    pub(crate) fn word(&mut self, text: &str) -> &mut Self {
        self.texts.extend_from_slice(text.as_bytes());
        self.ends.push(self.texts.len());
        self
    }

    /// A number as text.
    pub(crate) fn text(&mut self, value: u64) -> &mut Self {
        use std::io::Write as _;
        // Writing to memory does not fail.
        let _ = write!(self.texts, "{value}");
        self.ends.push(self.texts.len());
        self
    }

    /// The concurrency limit of a scope; negative if there is none.
    pub(crate) fn concurrency(&mut self, scope: &ScopeLimits) -> &mut Self {
        self.number(scope.concurrency.map_or(-1.0, f64::from))
    }

    /// The number of buckets of a scope, and each bucket.
    pub(crate) fn buckets(&mut self, scope: &ScopeLimits) -> &mut Self {
        self.int(scope.buckets.iter().flatten().count() as u64);
        for kind in Kind::ALL {
            let Some(bucket) = &scope.buckets[kind as usize] else { continue };
            let terms = Terms::of(kind, bucket);
            self.int(kind as u64 + 1).number(terms.cap).number(terms.num).number(terms.den);
        }
        self
    }

    /// Rule, kind, capacity, needed, added, rate.
    pub(crate) fn charge(&mut self, charge: &Charge) -> &mut Self {
        let terms = Terms::of(charge.kind, &charge.bucket);
        let rule = match charge.rule {
            ChargeRule::AllOrNothing => 0,
            ChargeRule::Always => 1,
            ChargeRule::Note => 2,
        };
        self.int(rule).int(charge.kind as u64 + 1).number(terms.cap).number(needed(charge));
        self.number(added(charge)).number(terms.num).number(terms.den)
    }
}

/// Whole microseconds, as scripts take them.
pub(super) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Whole milliseconds, as commands take them.
pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_travel_in_one_argument_before_the_texts() {
        let mut args = Args::default();
        args.int(3).text(600).id(ReservationId::from_u128(7)).flag(true).number(-1.0);
        let parts: Vec<&[u8]> = args.parts().collect();
        let numbers: Vec<f64> = parts[0]
            .chunks_exact(8)
            .map(|bytes| f64::from_le_bytes(bytes.try_into().expect("eight")))
            .collect();
        assert_eq!(numbers, [3.0, 1.0, -1.0]);
        assert_eq!(parts[1..], [&b"600"[..], b"00000000000000000000000000000007"]);
        assert_eq!((args.len(), args.bytes()), (3, 24 + 3 + 32));
    }
}
