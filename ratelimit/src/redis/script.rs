//! The scripts and the form of their arguments.

use std::sync::LazyLock;

use crate::budget::Terms;
use crate::call::{added, lines, needed};
use crate::usage::{OTHER_MODELS, USAGE_LIFE, USAGE_MODELS_MAX};
use crate::{Bucket, Charge, ChargeRule, Kind, ReservationId, ScopeLimits, Usage};

const METER: &str = include_str!("../scripts/meter.lua");

/// A script's text and the hash the server knows it by.
pub(crate) struct Script {
    text: String,
    hash: String,
}

pub(crate) static ACQUIRE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/acquire.lua")));
pub(crate) static SETTLE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/settle.lua")));
pub(crate) static RENEW: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/renew.lua")));
pub(crate) static MOVE_SLOT: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/move_slot.lua")));
pub(crate) static RELEASE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/release.lua")));
pub(crate) static CHARGE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/charge.lua")));
pub(crate) static BIRTH: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/birth.lua")));
pub(crate) static USAGE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../scripts/usage.lua")));
pub(crate) static PEEK: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("../scripts/peek.lua")));

impl Script {
    fn new(source: &str) -> Self {
        // The first line holds the flags and must stay first.
        let (flags, body) = source.split_once('\n').unwrap_or((source, ""));
        let text = format!("{flags}\n{METER}{body}");
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

/// Arguments in the order the scripts read them; every number is whole and below 2^53.
#[derive(Default)]
pub(crate) struct Args(pub(crate) Vec<Vec<u8>>);

impl Args {
    pub(crate) fn id(&mut self, id: ReservationId) -> &mut Self {
        self.0.push(id.simple().to_string().into_bytes());
        self
    }

    pub(crate) fn int(&mut self, value: u64) -> &mut Self {
        self.0.push(value.to_string().into_bytes());
        self
    }

    fn none(&mut self) -> &mut Self {
        self.0.push(b"-1".to_vec());
        self
    }

    /// Concurrency, number of buckets, and each bucket with its amount.
    pub(crate) fn scope(&mut self, scope: &ScopeLimits, amount: impl Fn(Kind, &Bucket) -> f64) -> &mut Self {
        match scope.concurrency {
            Some(limit) => self.int(u64::from(limit)),
            None => self.none(),
        };
        let lines = lines(scope, amount);
        self.int(lines.len() as u64);
        for line in lines {
            self.int(line.kind as u64 + 1).int(line.terms.cap as u64).int(line.amount as u64);
            self.int(line.terms.num as u64).int(line.terms.den as u64);
        }
        self
    }

    /// How long the record is kept, and the line; 0 for nothing to note.
    pub(crate) fn usage(&mut self, usage: Option<&Usage>) -> &mut Self {
        let Some(usage) = usage else { return self.int(0) };
        self.int(u64::try_from(USAGE_LIFE.as_millis()).unwrap_or(u64::MAX));
        self.0.push(usage.model.as_bytes().to_vec());
        self.int(USAGE_MODELS_MAX as u64);
        self.0.push(OTHER_MODELS.into());
        self.0.extend(usage.tally.to_array().map(|amount| amount.to_string().into_bytes()));
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
        self.int(rule).int(charge.kind as u64 + 1).int(terms.cap as u64).int(needed(charge) as u64);
        self.0.push((added(charge) as i64).to_string().into_bytes());
        self.int(terms.num as u64).int(terms.den as u64)
    }
}
