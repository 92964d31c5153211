//! Long computations on threads that serve others.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Work on more items than this may take some milliseconds.
const ITEMS_AT_ONCE: usize = 500;

/// Runs work on this many items. If they are many, the other tasks of this thread are moved to another one first, where the
/// runtime has several threads.
pub fn beside<T>(items: usize, work: impl FnOnce() -> T) -> T {
    let several = || Handle::try_current().is_ok_and(|h| h.runtime_flavor() == RuntimeFlavor::MultiThread);
    if items > ITEMS_AT_ONCE && several() { tokio::task::block_in_place(work) } else { work() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_with_and_without_a_runtime() {
        assert_eq!(beside(1_000_000, || 1), 1);
        let builders =
            [tokio::runtime::Builder::new_current_thread(), tokio::runtime::Builder::new_multi_thread()];
        for mut builder in builders {
            let runtime = builder.worker_threads(1).build().expect("a runtime");
            let other = runtime.spawn(async { beside(1_000_000, || 2) });
            assert_eq!(runtime.block_on(async { beside(1_000_000, || 1) + other.await.expect("done") }), 3);
        }
    }
}
