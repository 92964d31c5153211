//! Declares the metrics of a process as one table.

/// Declares a set of metrics: a row gives the field, its type, the metric's name and its help, and how it is made if not by
/// default. The set gets `Default` and `register`, so that no metric is made without being registered, and a metric's name
/// stands in one place.
///
/// ```
/// use prometheus_client::metrics::counter::Counter;
/// use prometheus_client::metrics::histogram::Histogram;
///
/// weir_runtime::metrics! {
///     /// What a baker counts.
///     struct Bakery {
///         loaves: Counter = "weir_loaves", "Loaves baked";
///         /// From the dough to the shelf.
///         duration: Histogram = "weir_loaf_seconds", "Time to bake a loaf", Histogram::new([60.0, 600.0]);
///     }
/// }
///
/// let mut registry = prometheus_client::registry::Registry::default();
/// let bakery = Bakery::default();
/// bakery.register(&mut registry);
/// bakery.loaves.inc();
/// bakery.duration.observe(90.0);
/// let mut page = String::new();
/// prometheus_client::encoding::text::encode(&mut page, &registry)?;
/// assert!(page.contains("# HELP weir_loaves Loaves baked.") && page.contains("weir_loaves_total 1"));
/// # Ok::<(), std::fmt::Error>(())
/// ```
#[macro_export]
macro_rules! metrics {
    (@made) => { ::std::default::Default::default() };
    (@made $made:expr) => { $made };
    (
        $(#[$of_set:meta])*
        $visibility:vis struct $Set:ident {
            $(
                $(#[$of_field:meta])*
                $field_visibility:vis $field:ident: $Metric:ty = $name:literal, $help:literal $(, $made:expr)?;
            )*
        }
    ) => {
        $(#[$of_set])*
        #[derive(Debug, Clone)]
        $visibility struct $Set {
            $(
                #[doc = $help]
                $(#[$of_field])*
                $field_visibility $field: $Metric,
            )*
        }

        impl ::std::default::Default for $Set {
            fn default() -> Self {
                Self { $($field: $crate::metrics!(@made $($made)?),)* }
            }
        }

        impl $Set {
            /// Registers every metric.
            $visibility fn register(&self, registry: &mut ::prometheus_client::registry::Registry) {
                $(registry.register($name, $help, self.$field.clone());)*
            }
        }
    };
}
