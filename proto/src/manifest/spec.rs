//! The file's forms of the specs; what the fields mean is said in `weir/v1/resources.proto`.

use std::collections::BTreeMap;

use super::mirror::mirror;
use super::scalar::{
    AdminState, BalancingPolicy, BudgetPeriod, Dialect, Duration, HitKind, Priority, RuleMode, Sha256,
    TimeUnit, Timestamp, WithoutStore,
};

mirror! {
    Pool of PoolSpec {
        balancing_policy: BalancingPolicy,
        regions: Vec<String>,
        timeouts: Option<Timeouts>,
        ejection: Option<Ejection>,
        retry_budget: Option<RetryBudget>,
        health: Option<HealthProfile>,
        affinity: Option<Affinity>,
        hedging: Option<Hedging>,
        queue: Option<Queue>,
    }
    Queue of Queue {
        max_waiting: u32,
        max_wait: Option<Duration>,
    }
    Affinity of Affinity {
        prefix_bytes: u32,
        load_percent: u32,
    }
    Hedging of Hedging {
        disabled: bool,
        floor: Option<Duration>,
        unary: bool,
    }
    Timeouts of Timeouts {
        connect: Option<Duration>,
        first_byte: Option<Duration>,
        idle: Option<Duration>,
        total: Option<Duration>,
        keep_alive: Option<Duration>,
    }
    Ejection of Ejection {
        consecutive_failures: u32,
        base_duration: Option<Duration>,
        max_duration: Option<Duration>,
        max_ejected_percent: u32,
        failure_percent: u32,
        failure_min_requests: u32,
    }
    RetryBudget of RetryBudget {
        percent: u32,
        min_per_second: u32,
        max_attempts: u32,
    }
    HealthProfile of HealthProfile {
        liveness_interval: Option<Duration>,
        timeout: Option<Duration>,
        unhealthy_threshold: u32,
        healthy_threshold: u32,
        readiness_interval: Option<Duration>,
        deep_interval: Option<Duration>,
        slow_start: Option<Duration>,
        loading_timeout: Option<Duration>,
        panic_percent: Option<u32>,
        paid_probes_per_hour: Option<u32>,
    }
    Backend of BackendSpec {
        pool: String,
        url: String,
        api_base_path: String,
        region: String,
        weight: Option<u32>,
        max_concurrency: Option<u32>,
        models: BTreeMap<String, Option<String>>,
        credential: String,
        admin_state: AdminState,
        connection: Option<ConnectionSettings>,
        priority: u32,
        account: String,
        dialect: Dialect,
    }
    ConnectionSettings of ConnectionSettings {
        max_idle: u32,
        idle_timeout: Option<Duration>,
        health_path: String,
    }
    Model of ModelSpec {
        pool: String,
        client_name: String,
        fallbacks: Vec<String>,
        input_price_micro_dollars: u64,
        output_price_micro_dollars: u64,
        cached_input_price_micro_dollars: Option<u64>,
        cache_write_price_micro_dollars: Option<u64>,
        timeouts: Option<Timeouts>,
        health_timeout: Option<Duration>,
        limits: Option<Rates>,
    }
    Tenant of TenantSpec {
        display_name: String,
        allowed_models: Vec<String>,
        limits: Option<Rates>,
        priority: Priority,
    }
    KeyDigest of KeyDigest {
        sha256: Sha256,
        prefix: String,
        expire_time: Option<Timestamp>,
    }
    ApiKey of ApiKeySpec {
        tenant: String,
        digests: Vec<KeyDigest>,
        revoked: bool,
        allowed_models: Vec<String>,
        limits: Option<Rates>,
    }
    Limit of LimitSpec {
        selector: Option<LimitSelector>,
        rates: Option<Rates>,
    }
    LimitSelector of LimitSelector {
        tenant: String,
        model: String,
        api_key: String,
        account: String,
        limit: String,
    }
    DescriptorRule of DescriptorRuleSpec {
        domain: String,
        entries: Vec<DescriptorEntry>,
        consumes: Vec<LimitSelector>,
        limit: Option<DescriptorLimit>,
        unlimited: bool,
        counts: HitKind,
        mode: RuleMode,
    }
    DescriptorEntry of DescriptorEntry {
        key: String,
        value: String,
    }
    DescriptorLimit of DescriptorLimit {
        requests_per_unit: u64,
        unit: TimeUnit,
        burst_multiplier: Option<f64>,
    }
    Rates of Rates {
        requests_per_minute: Option<u64>,
        tokens_per_minute: Option<u64>,
        input_tokens_per_minute: Option<u64>,
        output_tokens_per_minute: Option<u64>,
        concurrency: Option<u32>,
        burst_multiplier: Option<f64>,
        max_wait: Option<Duration>,
        without_store: WithoutStore,
        shadow: bool,
        budget: Option<Budget>,
        prefetch_percent: Option<u32>,
    }
    Budget of Budget {
        micro_dollars: u64,
        period: BudgetPeriod,
    }
}
