//! `GET /v1/models`: the models that a key may use.

use bytes::Bytes;

use crate::error::GatewayError;
use crate::routing::entries::KeyEntry;
use crate::routing::snapshot::Snapshot;

#[derive(serde::Serialize)]
struct ModelList<'a> {
    object: &'static str,
    data: Vec<ModelItem<'a>>,
}

#[derive(serde::Serialize)]
struct ModelItem<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
}

/// The list as OpenAI writes it.
pub(super) fn list(snapshot: &Snapshot, key: &KeyEntry) -> Result<Bytes, GatewayError> {
    let allowed = snapshot.models_by_name.values().filter(|m| key.allows(&m.name));
    let data = allowed.map(|m| ModelItem {
        id: &m.spec.client_name,
        object: "model",
        created: 0,
        owned_by: m.pool.name.as_str(),
    });
    let list = ModelList { object: "list", data: data.collect() };
    serde_json::to_vec(&list).map(Bytes::from).map_err(|_| GatewayError::Internal)
}
