//! Sums over the reports of all gateways, by backend.

use std::collections::BTreeMap;

use weir_proto::v1;

/// Requests in flight over all gateways, by backend.
pub(crate) type Loads = BTreeMap<String, u32>;

/// The results of all gateways' requests since the start, by backend.
pub(crate) type Traffic = BTreeMap<String, v1::AggregateTraffic>;
