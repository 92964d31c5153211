//! LiteLLM's clocks. All of them bound silence: its `timeout` is given to the HTTP client, which waits so long for the next
//! bytes. Of an answer that is not streamed that is the whole answer, of a stream the time between two chunks. A stream
//! goes by `stream_timeout` where one is set, be it for all models, and by `timeout` else.

use prost_types::Duration;
use weir_proto::v1::{ModelSpec, PoolSpec, Timeouts};

use crate::import::Import;

/// What LiteLLM waits when nothing is set (`litellm.request_timeout`), seconds.
const DEFAULT_S: i64 = 6000;
const STREAMS_TOO: &str = "became timeouts.total, which ends streams too after that time: LiteLLM lets one run on while it \
                           flows; raise it where streams take longer";
const KEPT: &str = "not set: LiteLLM's default of 6000 s was kept as timeouts.total; a stream may be silent for 5 min \
                    (timeouts.first_byte and timeouts.idle)";

/// Takes over `timeout` or `request_timeout`.
pub(super) fn total(clocks: &mut Option<Timeouts>, time: Option<Duration>, path: &str, out: &mut Import) {
    let Some(time) = time else { return };
    clocks.get_or_insert_default().total = Some(time);
    // What is the same for many models is said once.
    if out.notes.iter().all(|note| note.text != STREAMS_TOO) {
        out.note(path, STREAMS_TOO);
    }
}

/// Takes over `stream_timeout`.
pub(super) fn silence(clocks: &mut Option<Timeouts>, time: Option<Duration>) {
    let Some(time) = time else { return };
    let clocks = clocks.get_or_insert_default();
    (clocks.first_byte, clocks.idle) = (Some(time), Some(time));
}

/// Completes them once all is read.
pub(super) fn complete<'a>(
    pool: &mut PoolSpec,
    models: impl Iterator<Item = &'a mut ModelSpec>,
    out: &mut Import,
) {
    let no_silence = |clocks: &Option<Timeouts>| clocks.is_none_or(|clocks| clocks.idle.is_none());
    if no_silence(&pool.timeouts) {
        for clocks in models.map(|model| &mut model.timeouts).filter(|clocks| no_silence(clocks)) {
            let total = clocks.and_then(|clocks| clocks.total);
            silence(clocks, total);
        }
        let total = pool.timeouts.and_then(|clocks| clocks.total);
        silence(&mut pool.timeouts, total);
    }
    let clocks = pool.timeouts.get_or_insert_default();
    if clocks.total.is_none() {
        clocks.total = Some(Duration { seconds: DEFAULT_S, nanos: 0 });
        out.note("litellm_settings.request_timeout", KEPT);
    }
}
