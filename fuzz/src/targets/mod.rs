//! The targets. Each says its property once, above its function.

use crate::Target;

macro_rules! targets {
    ($($name:ident,)*) => {
        $(mod $name;)*

        /// Every target.
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), run: $name::run },)*];
    };
}

targets! {
    answer_headers,
    backup,
    cidr,
    credential,
    descriptors,
    disk_copy,
    engine_page,
    head_check,
    http1_framing,
    identity,
    json,
    json_request,
    limit_calls,
    litellm,
    manifest,
    ops_host,
    page_action,
    probe_answer,
    queries,
    ratelimit_rules,
    redis_reply,

    resource,
    scalars,
    sse_stream,
    store_url,
    store_values,
    unary_answer,
    upstream_error,
}
