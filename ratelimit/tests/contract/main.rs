//! The contract of [`weir_ratelimit::Limiter`], proved for memory and for a real Redis by the same cases.

mod away;
mod buckets;
mod charges;
mod clock;
mod cluster;
mod delays;
mod harness;
mod leases;
mod model;
mod outages;
mod properties;
mod quota_prefetch;
mod redis_only;
mod settlement;
mod usage;

/// Runs each case against both stores. Memory runs on a paused clock, Redis on its own real one.
macro_rules! suite {
    ($($module:ident: $($case:ident),+ $(,)?;)+) => {
        mod memory {
            $($(
                #[tokio::test(start_paused = true)]
                async fn $case() {
                    crate::$module::$case(crate::harness::World::memory()).await;
                }
            )+)+
        }
        mod redis {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    crate::$module::$case(crate::harness::World::redis().await).await;
                }
            )+)+
        }
        /// One after the other on one Cluster: three servers for each would be a crowd.
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn the_contract_holds_on_a_cluster() {
            let cluster = std::sync::Arc::new(crate::harness::Cluster::start().await);
            $($(
                eprintln!("{}", stringify!($case));
                // Each in its own place: together they would be more than a thread's stack holds.
                let world = crate::harness::World::cluster(&cluster).await;
                Box::pin(crate::$module::$case(world)).await;
            )+)+
        }
    };
}

suite! {
    buckets:
        exactly_a_hundred_of_two_thousand, a_refusal_changes_nothing, a_wait_is_exact, a_repeated_acquire_is_free,
        a_changed_limit_keeps_consumption, shadow_reports_and_admits, estimates_are_clamped_and_explicit_costs_are_not,
        rate_zero_never_drains, huge_limits_stay_exact, peek_writes_nothing, broken_calls_are_refused,
        the_wait_is_the_longest_of_all_limits, a_budget_counts_money_beyond_what_tokens_could;
    charges:
        a_refused_charge_changes_nothing, a_charge_shares_the_bucket_of_reservations,
        an_always_charge_goes_into_debt_and_refuses_until_something_is_left,
        a_noted_charge_never_refuses_and_stops_at_the_ceiling, a_credit_never_goes_below_empty,
        charges_of_one_record_see_each_other, other_kinds_of_the_record_are_kept, an_exact_wait_is_told,
        exactly_so_many_of_many_charges, broken_charges_are_refused;
    settlement:
        credit_returns_what_was_not_used, debit_goes_into_bounded_debt, settling_twice_applies_once,
        a_cancelled_acquire_that_comes_late_is_refused, an_unknown_reservation_is_debited_once,
        scopes_of_different_size_settle_exactly,
        an_account_refuses_and_settles_with_the_requests_own_scopes, credit_never_goes_below_empty,
        a_settlement_after_expiry_gives_no_credit;
    usage:
        usage_is_counted_once_with_its_settlement, usage_without_limits_is_counted_once,
        steps_and_their_correction_add_up, tenants_models_and_days_have_lines_of_their_own,
        too_many_models_are_added_up_together, a_day_is_forgotten_after_its_time;
    leases:
        concurrency_is_exact, a_lost_lease_frees_its_slot, renewal_keeps_a_lease, release_is_idempotent,
        candidates_are_tried_in_order, a_moved_slot_is_freed_and_taken, a_lowered_maximum_waits_for_its_surplus,
        leases_of_a_holder_that_is_gone_are_freed, settlement_frees_every_lease, a_closed_candidate_is_never_taken, shadow_concurrency_admits,
        a_part_of_what_all_have_is_bounded_by_live_counts,
        what_others_have_in_flight_counts_towards_a_part_of_all;
}
