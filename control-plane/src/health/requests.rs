//! What requests say of one backend: whether all of them fail, and whether somebody is being answered.
//!
//! Requests are what a backend is there for. One that answers probes and fails every request is no healthy backend. One that
//! answers requests is no dead one, however long a probe waits behind them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::evidence::{Observer, Passive, Seen, Timestamp};
use super::params::{
    IN_FLIGHT_FOR, PASSIVE_FAILURES, QUORUM, REQUESTS_WINDOW, SILENCE_HALF_LIFE, SILENCE_MAX, SILENCE_RATIO,
    SILENCE_UNKNOWN, UNPROVEN_MIN, VOTES_MAX, silence_min,
};
use super::tally::Context;
use super::tier::Tier;

/// What the requests of one gateway came to.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    reported: Timestamp,
    in_flight: u32,
    /// When bytes of an answer last came.
    answered: Option<Timestamp>,
    /// Answers since the last success that were failures of the backend. Silence and connections that cannot be opened may be
    /// the gateway's network: of these, probes are the judge.
    failures: u64,
    /// Requests since then that got no answer.
    unanswered: u64,
    /// Failures since then that the request may have caused.
    suspected: u64,
    failed: Timestamp,
    succeeded: Option<Timestamp>,
    seen: Option<Seen>,
}

impl Row {
    fn is_failing(&self, needed: u64, now: Timestamp) -> bool {
        self.failures >= needed && self.fails(now)
    }

    /// Nobody here is answered.
    fn is_mute(&self, now: Timestamp) -> bool {
        let recent = now.saturating_sub(self.failed) < REQUESTS_WINDOW;
        self.failures + self.unanswered >= PASSIVE_FAILURES && recent
    }

    fn fails(&self, now: Timestamp) -> bool {
        self.failures + self.suspected > 0 && now.saturating_sub(self.failed) < REQUESTS_WINDOW
    }

    fn succeeds(&self, now: Timestamp) -> bool {
        self.succeeded.is_some_and(|at| now.saturating_sub(at) < REQUESTS_WINDOW)
    }
}

/// Every request fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failing {
    /// Enough gateways know that it is the backend and not the requests.
    pub(super) is_proven: bool,
    /// For people; without numbers, so that it is the same as long as its cause is.
    pub(super) detail: String,
}

/// The requests of all gateways at one backend.
#[derive(Debug, Clone, Default)]
pub(super) struct Requests {
    /// At most [`VOTES_MAX`]; the oldest makes room.
    by: BTreeMap<Observer, Row>,
    /// Since when there is always a request in flight.
    busy_since: Option<Timestamp>,
    answered: Option<Timestamp>,
    /// The longest silence with requests in flight, and when it was seen.
    silence: Option<(Duration, Timestamp)>,
}

impl Requests {
    /// Takes what a gateway reports.
    pub(super) fn report(&mut self, gateway: &Observer, passive: &Passive, now: Timestamp) {
        if self.by.len() >= VOTES_MAX && !self.by.contains_key(gateway) {
            let oldest =
                self.by.iter().min_by_key(|(_, row)| row.reported).map(|(gateway, _)| gateway.clone());
            if let Some(oldest) = oldest {
                self.by.remove(&oldest);
            }
        }
        let row = self.by.entry(gateway.clone()).or_default();
        (row.reported, row.in_flight) = (now, passive.in_flight);
        if passive.failures() > 0 || passive.suspected > 0 {
            (row.failed, row.seen) = (now, passive.seen.or(row.seen));
        }
        // Which of a report's results was the last one is not known.
        if passive.successes > 0 {
            (row.succeeded, row.failures, row.unanswered, row.suspected) = (Some(now), 0, 0, 0);
        } else {
            row.failures = row.failures.saturating_add(passive.server_errors);
            row.unanswered =
                row.unanswered.saturating_add(passive.timeouts).saturating_add(passive.connect_failures);
            row.suspected = row.suspected.saturating_add(passive.suspected);
        }
        if passive.is_answered() {
            row.answered = Some(now);
        }
        self.listen(passive.is_answered(), now);
    }

    /// Learns how long the backend is silent while somebody waits.
    fn listen(&mut self, is_answered: bool, now: Timestamp) {
        let before = self.busy_since;
        self.busy_since = self.is_busy(now).then(|| before.unwrap_or(now));
        if !is_answered {
            return;
        }
        if let Some(since) = before {
            let silence = now.saturating_sub(self.answered.unwrap_or(since).max(since)).min(SILENCE_MAX);
            if silence >= self.usual_silence(now).unwrap_or_default() {
                self.silence = Some((silence, now));
            }
        }
        self.answered = Some(now);
    }

    fn is_busy(&self, now: Timestamp) -> bool {
        let has = |row: &Row| row.in_flight > 0 && now.saturating_sub(row.reported) < IN_FLIGHT_FOR;
        self.by.values().any(has)
    }

    fn usual_silence(&self, now: Timestamp) -> Option<Duration> {
        self.silence.map(|(silence, at)| {
            let half_lives = now.saturating_sub(at).as_secs_f64() / SILENCE_HALF_LIFE.as_secs_f64();
            silence.mul_f64(0.5_f64.powf(half_lives))
        })
    }

    /// Whether the backend works at requests and is not silent for longer than it usually is: a probe without an answer then waits
    /// behind them. That a server lives at all takes the word of a quorum of gateways, so that one which lies keeps no dead
    /// backend in use; and none outweighs a quorum of others whose requests fail.
    pub(super) fn are_answered(&self, tier: Tier, gateways: usize, now: Timestamp) -> bool {
        let Some(since) = self.busy_since.filter(|_| self.is_busy(now)) else { return false };
        let silence = self.usual_silence(now).unwrap_or(SILENCE_UNKNOWN).mul_f64(SILENCE_RATIO);
        let patience = silence.max(silence_min(tier)).min(SILENCE_MAX);
        if self.by.values().filter(|row| row.is_mute(now)).count() >= QUORUM {
            return false;
        }
        // Before the first answer nobody can have been answered.
        let last = self.answered.filter(|at| *at >= since);
        if now.saturating_sub(last.unwrap_or(since)) > patience {
            return false;
        }
        // An engine that answers one request at a time answers gateways in turn.
        let lately = |row: &&Row| row.answered.is_some_and(|at| now.saturating_sub(at) <= patience * 2);
        let is_of_several = tier == Tier::Liveness && gateways >= QUORUM;
        !is_of_several || self.by.values().filter(lately).count() >= QUORUM
    }

    /// Whether every request fails, where `needed` failures of a gateway without a success are enough, and `quorum` gateways prove
    /// it.
    pub(super) fn fail(
        &self,
        needed: u64,
        quorum: usize,
        context: &Context<'_>,
        now: Timestamp,
    ) -> Option<Failing> {
        let rows = || self.by.iter().filter(|(gateway, _)| !context.isolated.contains(gateway, now));
        let failing = || rows().filter(|(_, row)| row.fails(now));
        let proven = failing().filter(|(_, row)| row.is_failing(needed, now)).count();
        let is_proven = proven >= quorum.max(1);
        if rows().any(|(_, row)| row.succeeds(now) && !row.is_failing(needed, now)) {
            return None;
        }
        let suspected = failing().map(|(_, row)| row.suspected).fold(0, u64::saturating_add);
        // Bad requests fail everywhere.
        let may_be_bad = suspected < UNPROVEN_MIN || rows().any(|(_, row)| row.succeeds(now));
        if proven == 0 && may_be_bad {
            return None;
        }
        let (gateway, newest) = failing().max_by_key(|(_, row)| row.failed)?;
        let seen = newest.seen.unwrap_or(Seen::Said("a failure"));
        let whom = match failing().count() {
            1 => gateway.to_string(),
            _ => "several gateways".to_owned(),
        };
        let hint = match seen {
            Seen::Status(404 | 405) => {
                format!("; is the path in its url right? requests go to {}", context.endpoint)
            }
            _ => String::new(),
        };
        Some(Failing { is_proven, detail: format!("{seen} to every request of {whom}{hint}") })
    }

    /// Forgets who failed: what comes from now on is to tell.
    pub(super) fn begin_anew(&mut self) {
        for row in self.by.values_mut() {
            (row.failures, row.unanswered, row.suspected, row.succeeded) = (0, 0, 0, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::no_isolated_observers;

    const HOUR: u64 = 3600;

    fn gateway(n: usize) -> Observer {
        Observer::Gateway(format!("gateway-{n}").into())
    }

    fn at(seconds: u64) -> Timestamp {
        Duration::from_secs(seconds)
    }

    fn in_flight(answering: bool) -> Passive {
        Passive { in_flight: 2, answering, ..Passive::default() }
    }

    #[test]
    fn a_backend_is_given_twice_the_silence_that_it_usually_keeps() {
        for (answers_every, patience) in [(1, 4), (12, 24), (40, 80), (200, 300)] {
            let mut requests = Requests::default();
            for second in 0..HOUR {
                requests.report(&gateway(0), &in_flight(second % answers_every == 0), at(second));
            }
            let last = (HOUR - 1) / answers_every * answers_every;
            let mut until = HOUR;
            while requests.are_answered(Tier::Liveness, 1, at(until)) {
                until += 1;
                requests.report(&gateway(0), &in_flight(false), at(until));
            }
            let kept = until - 1 - last;
            // A little less, since the longest silence is forgotten with time.
            assert!((patience * 9 / 10 - 1..=patience).contains(&kept), "{answers_every} s: {kept} s");
        }
    }

    #[test]
    fn nobody_is_waited_for_without_a_request_in_flight_and_no_silence_for_ever() {
        let mut requests = Requests::default();
        assert!(!requests.are_answered(Tier::Readiness, 1, at(1)));
        requests.report(&gateway(0), &Passive { successes: 1, ..Passive::default() }, at(1));
        assert!(!requests.are_answered(Tier::Readiness, 1, at(2)));
        for second in 2..100 {
            requests.report(&gateway(0), &in_flight(false), at(second));
            assert_eq!(requests.are_answered(Tier::Readiness, 1, at(second)), second <= 32, "{second}");
        }
    }

    #[test]
    fn one_gateway_that_says_all_is_well_does_not_outweigh_two_whose_requests_fail() {
        let mut requests = Requests::default();
        for second in 0..60 {
            requests.report(&gateway(0), &in_flight(true), at(second));
            assert!(requests.are_answered(Tier::Liveness, 1, at(second)));
            assert!(requests.are_answered(Tier::Readiness, 3, at(second)));
            assert!(!requests.are_answered(Tier::Liveness, 3, at(second)), "one of three: it may lie");
        }
        requests.report(&gateway(1), &in_flight(true), at(60));
        assert!(requests.are_answered(Tier::Liveness, 3, at(60)));
        for n in 1..3 {
            requests.report(&gateway(n), &Passive { timeouts: 3, ..Passive::default() }, at(60));
        }
        assert!(!requests.are_answered(Tier::Readiness, 3, at(60)));
    }

    /// Failures for which there is proof, those that may be the requests' fault, and successes.
    fn failing(n: usize, proven: u64, suspected: u64, successes: u64) -> (Observer, Passive) {
        let seen = Some(Seen::Status(404));
        (gateway(n), Passive { server_errors: proven, suspected, successes, seen, ..Passive::default() })
    }

    #[test]
    fn every_request_fails_where_nobody_succeeds_and_another_backend_proves_it_or_many_failed() {
        let isolated = no_isolated_observers();
        let context = |gateways| Context {
            isolated: &isolated,
            ready_capable: true,
            gateways,
            endpoint: "http://b/v1/v1",
        };
        for (gateways, reports, proven) in [
            (1, vec![failing(0, 3, 3, 0)], Some(true)),
            (1, vec![failing(0, 0, 9, 0)], None),
            (1, vec![failing(0, 0, 10, 0)], Some(false)),
            (1, vec![failing(0, 2, 2, 0)], None),
            (1, vec![failing(0, 30, 30, 1)], None),
            (5, vec![failing(0, 3, 3, 0)], Some(false)),
            (5, vec![failing(0, 3, 3, 0), failing(1, 3, 3, 0)], Some(true)),
            (5, vec![failing(0, 3, 3, 0), failing(1, 3, 3, 0), failing(2, 0, 0, 1)], None),
            (5, vec![failing(0, 0, 90, 0), failing(1, 0, 0, 1)], None),
        ] {
            let mut requests = Requests::default();
            for (gateway, passive) in &reports {
                requests.report(gateway, passive, at(1));
            }
            let found = requests.fail(PASSIVE_FAILURES, QUORUM.min(gateways), &context(gateways), at(2));
            assert_eq!(found.as_ref().map(|failing| failing.is_proven), proven, "{reports:?}");
            if let Some(found) = found {
                assert!(found.detail.starts_with("404 to every request of "), "{}", found.detail);
                assert!(found.detail.ends_with("requests go to http://b/v1/v1"), "{}", found.detail);
            }
            assert_eq!(requests.fail(1, 1, &context(gateways), at(60)), None, "and not for ever");
        }
    }
}
