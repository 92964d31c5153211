//! How full budgets are, read when metrics are read.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::control::traffic_report::TrafficCounter;

/// Reads the budgets that requests met lately.
#[derive(Debug)]
pub(crate) struct BudgetMetrics(pub(crate) Arc<TrafficCounter>);

impl Collector for BudgetMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Used part of a budget, 0 to 1, in the whole cluster, as the last request here found it; of the 100 fullest that \
                    requests met within a minute";
        let mut family =
            encoder.encode_descriptor("weir_budget_used_ratio", help, None, MetricType::Gauge)?;
        for budget in self.0.budgets() {
            let labels = [("scope", budget.scope), ("name", budget.name.as_str()), ("period", budget.period)];
            ConstGauge::new(budget.used).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
