use std::cell::RefCell;

use prost::Message;
use tokio::runtime::{Builder, Runtime};
use tonic::{Code, Status};
use weir_ratelimit_service::fuzzing::Services;

use crate::input::Input;

const CALLS_MAX: usize = 16;

thread_local! {
    // Its clock stands still but for what is waited for.
    static RUNTIME: RefCell<Runtime> = RefCell::new(
        Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime"),
    );
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.with_borrow(|runtime| runtime.block_on(future))
}

/// Any calls, one after the other, have answers or are called wrong. The service stays able to answer.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    block_on(async {
        let services = Services::new(&[]);
        for _ in 0..CALLS_MAX {
            let (call, most) = (input.byte(), usize::from(input.byte()));
            let rest = std::mem::replace(&mut input, Input::new(&[])).rest();
            let (message, rest) = rest.split_at(rest.len().min(most));
            input = Input::new(rest);
            match call % 5 {
                0 => judged(read(message, |call| services.acquire(call)).await),
                1 => judged(read(message, |call| services.settle(call)).await),
                2 => judged(read(message, |call| services.renew(call)).await),
                3 => judged(read(message, |call| services.release(call)).await),
                _ => judged(read(message, |call| services.peek(call)).await),
            }
            if rest.is_empty() {
                break;
            }
        }
    });
}

async fn read<Q: Message + Default, A, F: Future<Output = Result<A, Status>>>(
    message: &[u8],
    call: impl FnOnce(Q) -> F,
) -> Option<Result<A, Status>> {
    match Q::decode(message) {
        Ok(message) => Some(call(message).await),
        Err(_) => None,
    }
}

fn judged<A>(answer: Option<Result<A, Status>>) {
    if let Some(Err(status)) = answer {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
}
