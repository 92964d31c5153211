//! How a value in a file and the same value on the wire become each other.

use std::collections::{BTreeMap, HashMap};

/// A file's form of the wire's `W`.
pub(super) trait Mirror<W>: Sized {
    fn from_wire(wire: &W) -> Self;
    fn into_wire(self) -> W;
}

/// Whether a value is what its absence means, so that it need not be written.
pub(super) trait Absent {
    fn is_absent(&self) -> bool;
}

macro_rules! plain {
    ($($ty:ty)*) => { $(
        impl Mirror<$ty> for $ty {
            fn from_wire(wire: &$ty) -> Self {
                wire.clone()
            }
            fn into_wire(self) -> $ty {
                self
            }
        }
        impl Absent for $ty {
            fn is_absent(&self) -> bool {
                *self == <$ty>::default()
            }
        }
    )* };
}

plain! { bool u32 u64 f64 String }

impl<W, F: Mirror<W>> Mirror<Option<W>> for Option<F> {
    fn from_wire(wire: &Option<W>) -> Self {
        wire.as_ref().map(F::from_wire)
    }
    fn into_wire(self) -> Option<W> {
        self.map(F::into_wire)
    }
}

impl<F> Absent for Option<F> {
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

impl<W, F: Mirror<W>> Mirror<Vec<W>> for Vec<F> {
    fn from_wire(wire: &Vec<W>) -> Self {
        wire.iter().map(F::from_wire).collect()
    }
    fn into_wire(self) -> Vec<W> {
        self.into_iter().map(F::into_wire).collect()
    }
}

impl<F> Absent for Vec<F> {
    fn is_absent(&self) -> bool {
        self.is_empty()
    }
}

/// Sorted, so that the same resource is always written the same. A key without a value has the empty one.
impl Mirror<HashMap<String, String>> for BTreeMap<String, Option<String>> {
    fn from_wire(wire: &HashMap<String, String>) -> Self {
        wire.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect()
    }
    fn into_wire(self) -> HashMap<String, String> {
        self.into_iter().map(|(k, v)| (k, v.unwrap_or_default())).collect()
    }
}

impl<K, V> Absent for BTreeMap<K, V> {
    fn is_absent(&self) -> bool {
        self.is_empty()
    }
}

/// Declares the file's form of a message: the same fields by the same names, unknown keys refused, absent ones not
/// written.
macro_rules! mirror {
    ($($(#[$meta:meta])* $name:ident of $wire:ident { $($field:ident: $ty:ty),* $(,)? })*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name {
            $(#[serde(skip_serializing_if = "crate::manifest::mirror::Absent::is_absent")] $field: $ty,)*
        }

        impl crate::manifest::mirror::Mirror<crate::v1::$wire> for $name {
            fn from_wire(wire: &crate::v1::$wire) -> Self {
                Self { $($field: crate::manifest::mirror::Mirror::from_wire(&wire.$field),)* }
            }
            fn into_wire(self) -> crate::v1::$wire {
                crate::v1::$wire { $($field: crate::manifest::mirror::Mirror::into_wire(self.$field),)* }
            }
        }
    )* };
}
pub(super) use mirror;
