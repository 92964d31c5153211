//! The configuration of a bench's gateways: resources, as the copy on disk that gateways keep.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use prost::Message;
use sha2::{Digest, Sha256};
use weir_discovery::{ConfigState, Disk};
use weir_proto::v1::{self, resource::Spec};

/// The tenant of [`Resources::basic`] and its key.
pub(crate) const KEY: &str = "weir_bench_key";

/// Resources by kind and name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resources(BTreeMap<(i32, String), v1::Resource>);

impl Resources {
    /// A tenant `acme` with the key [`KEY`].
    pub(crate) fn basic() -> Self {
        let mut resources = Self::default();
        resources.tenant("acme", KEY, None);
        resources
    }

    /// Adds or replaces one.
    pub(crate) fn put(&mut self, name: &str, spec: Spec) -> &mut Self {
        let resource = v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
        let kind = weir_proto::resource::kind_of(&resource) as i32;
        self.0.insert((kind, name.into()), resource);
        self
    }

    /// A tenant with one key, whose resource has the tenant's name.
    pub(crate) fn tenant(&mut self, name: &str, key: &str, limits: Option<v1::Rates>) -> &mut Self {
        self.put(name, Spec::Tenant(v1::TenantSpec { limits, ..Default::default() }));
        let digest = v1::KeyDigest {
            sha256: Sha256::digest(key).to_vec(),
            prefix: "weir_bench".into(),
            expire_time: None,
        };
        let spec = v1::ApiKeySpec { tenant: name.into(), digests: vec![digest], ..Default::default() };
        self.put(&format!("{name}-key"), Spec::ApiKey(spec))
    }

    /// A model with a pool of its own and one backend in it.
    pub(crate) fn model_at(&mut self, model: &str, address: SocketAddr) -> &mut Self {
        self.put(model, Spec::Pool(v1::PoolSpec::default()));
        self.put(model, Spec::Backend(backend(model, model, address, 100_000)));
        self.put(model, Spec::Model(v1::ModelSpec { pool: model.into(), ..Default::default() }))
    }

    /// A tenant `acme` and these models; with limits of every kind that are so wide that none refuses.
    pub(crate) fn wide(models: &[(&str, SocketAddr)], limits: bool) -> Self {
        let requests = v1::Rates {
            requests_per_minute: Some(1_000_000_000),
            burst_multiplier: Some(1.0),
            ..Default::default()
        };
        let wide =
            || v1::Rates { tokens_per_minute: Some(9_000_000_000), concurrency: Some(100_000), ..requests };
        let mut resources = Self::basic();
        for (model, address) in models {
            resources.model_at(model, *address);
            if limits {
                let spec =
                    v1::ModelSpec { pool: (*model).into(), limits: Some(wide()), ..Default::default() };
                resources.put(model, Spec::Model(spec));
            }
        }
        if limits {
            resources.tenant("acme", KEY, Some(wide()));
            resources.put("everything", Spec::Limit(v1::LimitSpec { selector: None, rates: Some(requests) }));
        }
        resources
    }

    /// All resources, for a control plane.
    pub(crate) fn list(&self) -> Vec<v1::Resource> {
        self.0.values().cloned().collect()
    }

    /// Writes the copy on disk of a gateway with this data directory.
    pub(crate) fn save(&self, directory: &Path) -> anyhow::Result<()> {
        let mut held = ConfigState::new("bench", 1);
        for ((kind, name), resource) in &self.0 {
            held.insert(*kind, name, "1", &resource.encode_to_vec());
        }
        let disk = Disk::new(directory).with_context(|| format!("{}", directory.display()))?;
        disk.save(&held).map_err(|error| anyhow::anyhow!("{}: {error}", directory.display()))
    }
}

/// A backend that serves one model.
pub(crate) fn backend(pool: &str, model: &str, address: SocketAddr, slots: u32) -> v1::BackendSpec {
    v1::BackendSpec {
        pool: pool.into(),
        url: format!("http://{address}"),
        max_concurrency: Some(slots),
        models: [(model.to_owned(), String::new())].into(),
        // As many as the load may need, because a proxy that reconnects is not measured.
        connection: Some(v1::ConnectionSettings { max_idle: 1000, ..Default::default() }),
        ..Default::default()
    }
}
