//! The differences between two versions of a resource, for the log and for plans.

use prost_reflect::DynamicMessage;
use weir_proto::resource::{kind_name, kind_of};
use weir_proto::v1;

use crate::reflect::diff::{Difference, differences};
use crate::reflect::{descriptor, reflect};

/// The fields that differ between two versions of a resource, one of which may be missing; paths are below the spec.
/// Digests are left out: a changed key shows by its prefix.
pub(crate) fn fields(before: Option<&v1::Resource>, after: Option<&v1::Resource>) -> Vec<Difference> {
    const RESOURCE: &str = "weir.v1.Resource";
    let visible = |wire: Option<&v1::Resource>| {
        let shown = |wire: &v1::Resource| {
            let mut spec = wire.spec.clone();
            if let Some(v1::resource::Spec::ApiKey(key)) = &mut spec {
                key.digests.iter_mut().for_each(|digest| digest.sha256.clear());
            }
            v1::Resource { spec, ..v1::Resource::default() }
        };
        wire.and_then(|wire| reflect(RESOURCE, &shown(wire)).ok())
            .unwrap_or_else(|| DynamicMessage::new(descriptor(RESOURCE)))
    };
    let mut fields = differences(&visible(before), &visible(after));
    let kind = after.or(before).map_or(v1::ResourceKind::Unspecified, kind_of);
    let prefix = format!("{}.", kind_name(kind));
    for (path, _, _) in &mut fields {
        if let Some(below) = path.strip_prefix(&prefix) {
            *path = below.to_owned();
        }
    }
    let set = |wire: Option<&v1::Resource>| wire.map(|wire| wire.apply_set.clone()).unwrap_or_default();
    let (old, new) = (set(before), set(after));
    if old != new {
        let json = |text: &str| if text.is_empty() { String::new() } else { format!("{text:?}") };
        fields.push(("apply_set".into(), json(&old), json(&new)));
    }
    fields
}
