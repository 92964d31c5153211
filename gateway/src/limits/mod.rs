//! What a request costs and how that is reserved, charged and given back, exactly once on every way out.
//!
//! A [`reservation`] exists from before the limiter is asked until the last byte went out. Whatever ends the request ends
//! the reservation: it is settled with what was used by then, and dropping it is enough. `Drop` never waits: it hands the
//! settlement to the worker of the [`ledger`] over a bounded channel and counts what does not fit (those reservations
//! stand at what was reserved, and their leases run out).
//!
//! Where a provider's account is limited, each attempt at it has a reservation there: the first one's is part of the
//! request's own, a later one's is a reservation of its own
//! ([`Reservation::ask`](reservation::Reservation::ask)). The account that answered is settled with what was used; one
//! whose attempt failed or was overtaken stands at what was reserved, since providers count failed requests too (OpenAI:
//! "unsuccessful requests contribute to your per-minute limit",
//! <https://platform.openai.com/docs/guides/rate-limits>).
//!
//! [`slot_lease`] takes a backend's slot without a request, for probes; [`estimates`] and [`price`] say what a request
//! will probably cost; [`account_groups`] orders candidates by provider account; [`orphan_reaper`] frees the leases of gateways that are gone.

pub mod account_groups;
pub mod estimates;
pub mod ledger;
pub mod orphan_reaper;
pub mod price;
pub mod reservation;
pub mod slot_lease;
