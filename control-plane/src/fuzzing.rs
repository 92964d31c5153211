//! What is private here and reads bytes of strangers, for the fuzz targets alone.

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use weir_proto::v1;

use crate::auth::role_name;
use crate::model::State;
use crate::model::audit::Logged;
use crate::page::act::Action;
use crate::store::{Range, backup};
use crate::tls::Identity;

pub use crate::store::fuzzing as etcd;

/// What the body of a change from the page asks for, and the etag.
pub fn action(body: &[u8]) -> Result<(String, String), String> {
    let (action, etag) = Action::parse(body).map_err(|status| status.message().to_owned())?;
    Ok((format!("{action:?}"), etag))
}

/// Role and name in a URI of a certificate.
pub fn named(uri: &str) -> Option<(&'static str, String)> {
    crate::tls::named(uri).map(role_and_name)
}

/// Role and name in a certificate.
pub fn certificate(der: &[u8]) -> Option<(&'static str, String)> {
    crate::tls::identity(&CertificateDer::from(der)).map(role_and_name)
}

fn role_and_name(identity: Identity) -> (&'static str, String) {
    (role_name(identity.role), identity.name.to_string())
}

/// The file of a backup: of what there is in another one.
pub fn copy(file: &[u8]) -> Result<Bytes, &'static str> {
    backup::decode(file).map(|range| backup::encode(&range))
}

/// Everything that a store with this backup in it shows: its resources and its audit log.
pub fn stored(file: &[u8]) -> Option<(Vec<v1::Resource>, Vec<v1::AuditEntry>)> {
    let range: Range = backup::decode(file).ok()?;
    let logged = range.entries.iter().filter_map(|entry| {
        let logged = Logged::decode(&entry.key, &entry.value, entry.revision).ok()?;
        logged.events().for_each(drop);
        Some(logged.to_wire())
    });
    let logged = logged.collect();
    let state = State::load(&range).ok()?;
    Some((state.resources.values().map(|stored| stored.wire.clone()).collect(), logged))
}
