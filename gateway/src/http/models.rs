//! `GET /v1/models` and `GET /v1/models/{id}`: the models that a key may use.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::GatewayError;
use crate::routing::entries::{KeyEntry, ModelEntry};
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

impl<'a> ModelItem<'a> {
    fn of(model: &'a ModelEntry) -> Self {
        Self { id: &model.spec.client_name, object: "model", created: 0, owned_by: model.pool.name.as_str() }
    }
}

/// One model as OpenAI writes it, by the name that clients know it by.
pub(super) fn one(snapshot: &Snapshot, key: &KeyEntry, id: &str) -> Result<Bytes, GatewayError> {
    written(&ModelItem::of(choose(snapshot, key, id)?))
}

/// The model that a client names, if its key allows it.
pub(super) fn choose<'a>(
    snapshot: &'a Snapshot,
    key: &KeyEntry,
    name: &str,
) -> Result<&'a Arc<ModelEntry>, GatewayError> {
    match snapshot.models.get(name) {
        None => Err(GatewayError::ModelNotFound { model: name.to_owned() }),
        Some(model) if !key.allows(&model.name) => {
            Err(GatewayError::ModelNotAllowed { model: name.to_owned() })
        }
        Some(model) => Ok(model),
    }
}

/// The list as OpenAI writes it.
pub(super) fn list(snapshot: &Snapshot, key: &KeyEntry) -> Result<Bytes, GatewayError> {
    let allowed = snapshot.models_by_name.values().filter(|m| key.allows(&m.name));
    let data = allowed.map(|m| ModelItem::of(m)).collect();
    written(&ModelList { object: "list", data })
}

fn written(answer: &impl serde::Serialize) -> Result<Bytes, GatewayError> {
    serde_json::to_vec(answer).map(Bytes::from).map_err(|_| GatewayError::Internal)
}
