//! The maximum of ejections and panic mode of a pool: which unhealthy backends are used although their state says otherwise.
//!
//! Only observed health can be overridden. Backends that an operator drained or disabled are not passed to [`decide`].

use super::evidence::Timestamp;

/// One ACTIVE backend of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) weight: u32,
    pub(crate) status: MemberStatus,
}

/// The state of a member, as far as the pool needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberStatus {
    /// Healthy, degraded or recovering.
    Usable,
    /// No probe has passed yet.
    Unproven,
    /// Unhealthy: the time of the ejection, and whether all observers saw refused connections.
    Broken { ejected_at: Timestamp, refused: bool },
}

/// What a pool does with a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// As its state says.
    Normal,
    /// Not used while other backends are usable.
    Out,
    /// Used although its state says otherwise, because too much of the pool would be left out.
    Overridden,
}

/// Which backends a pool uses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct PoolDecision {
    /// In the order of the members.
    pub(crate) uses: Vec<Use>,
    /// Panic mode: every backend that accepts connections is used.
    pub(crate) panic: bool,
    /// Unhealthy backends that stay in use because of the maximum.
    pub(crate) over_budget: usize,
}

/// The maximum of ejected backends of a pool. Backends that refuse connections are not counted.
pub(crate) const fn budget(members: usize, max_ejected_percent: u32) -> usize {
    members * max_ejected_percent as usize / 100
}

/// Decides which backends a pool uses.
pub(crate) fn decide(members: &[Member], max_ejected_percent: u32, panic_percent: u32) -> PoolDecision {
    let weight = |member: &Member| u64::from(member.weight.max(1));
    let sum = |keep: &dyn Fn(&MemberStatus) -> bool| {
        members.iter().filter(|m| keep(&m.status)).map(weight).sum::<u64>()
    };
    let proven = sum(&|s| *s == MemberStatus::Usable);
    let unproven = sum(&|s| *s == MemberStatus::Unproven);
    let broken = sum(&|s| matches!(s, MemberStatus::Broken { .. }));
    // Unproven backends are used only while no backend of the pool is proven.
    let usable = if proven > 0 { proven } else { unproven };
    let panic = broken > 0 && usable * 100 < (usable + broken) * u64::from(panic_percent);
    let refused = |m: &Member| matches!(m.status, MemberStatus::Broken { refused: true, .. });
    let mut left = budget(members.len(), max_ejected_percent)
        .saturating_sub(members.iter().filter(|m| refused(m)).count());
    // Backends are left out in the order in which they were ejected.
    let mut order: Vec<(Timestamp, usize)> = members
        .iter()
        .enumerate()
        .filter_map(|(i, m)| match m.status {
            MemberStatus::Broken { ejected_at, refused: false } => Some((ejected_at, i)),
            _ => None,
        })
        .collect();
    order.sort_unstable();
    let mut uses: Vec<Use> = members
        .iter()
        .map(|m| match m.status {
            MemberStatus::Usable => Use::Normal,
            MemberStatus::Unproven if proven > 0 => Use::Out,
            MemberStatus::Unproven => Use::Normal,
            MemberStatus::Broken { .. } => Use::Out,
        })
        .collect();
    let mut over_budget = 0;
    for (_, i) in order {
        if panic || left == 0 {
            over_budget += usize::from(left == 0);
            uses[i] = Use::Overridden;
        }
        left = left.saturating_sub(1);
    }
    // Without any other backend even those that refuse connections are used; they fail at once.
    if !members.is_empty() && uses.iter().all(|u| *u == Use::Out) {
        uses.fill(Use::Overridden);
    }
    PoolDecision { uses, panic, over_budget }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn members(text: &str) -> Vec<Member> {
        let member = |(i, c): (usize, char)| Member {
            name: i.to_string(),
            weight: 100,
            status: match c {
                'u' => MemberStatus::Usable,
                '?' => MemberStatus::Unproven,
                c => MemberStatus::Broken { ejected_at: Duration::from_secs(i as u64), refused: c == 'r' },
            },
        };
        text.chars().enumerate().map(member).collect()
    }

    fn uses(text: &str) -> (String, bool) {
        let decision = decide(&members(text), 50, 50);
        let letter = |u: &Use| match u {
            Use::Normal => 'n',
            Use::Out => '-',
            Use::Overridden => '!',
        };
        (decision.uses.iter().map(letter).collect(), decision.panic)
    }

    #[test]
    fn what_is_broken_is_out_until_too_little_is_left() {
        for (pool, expected, panic) in [
            ("uuu", "nnn", false),
            ("uub", "nn-", false),
            ("ubb", "n!!", true),
            ("bbb", "!!!", true),
            ("uubb", "nn--", false),
            ("ubbb", "n!!!", true),
            ("ub", "n-", false),
            ("b", "!", true),
            // Backends that refuse connections are used only when nothing else is left.
            ("urr", "n--", true),
            ("brr", "!--", true),
            ("rrr", "!!!", true),
            ("r", "!", true),
            // All unproven backends are used until the first one is proven.
            ("???", "nnn", false),
            ("u??", "n--", false),
            ("??b", "nn-", false),
            ("?bb", "n!!", true),
        ] {
            assert_eq!(uses(pool), (expected.to_owned(), panic), "{pool}");
        }
        assert_eq!(decide(&[], 50, 50), PoolDecision::default());
    }

    #[test]
    fn the_budget_binds_where_panic_does_not() {
        let decision = decide(&members("uuuubbb"), 20, 10);
        assert_eq!(decision.uses.iter().filter(|u| **u == Use::Out).count(), 1);
        assert_eq!(decision.uses[4], Use::Out, "who fell first");
        assert!(!decision.panic);
        assert_eq!(decision.over_budget, 2);
    }
}
