//! The calls of a request that are under way: few, each with the number of its attempt.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use smallvec::SmallVec;

use super::attempt::{Answer, Failure};

/// Attempts of one request under way at once.
pub(super) const PARALLEL_MAX: usize = 2;

/// What a call comes to.
type Exchange = Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send>>;

/// The calls under way. Dropping one closes its connection.
#[derive(Default)]
pub(super) struct Exchanges(SmallVec<[(u32, Exchange); PARALLEL_MAX]>);

impl Exchanges {
    /// Begins the call of an attempt.
    pub(super) fn push(
        &mut self,
        number: u32,
        exchange: impl Future<Output = Result<Answer, Failure>> + Send + 'static,
    ) {
        self.0.push((number, Box::pin(exchange)));
    }

    /// The next call that ends, with the number of its attempt; waits for ever when there is none. Cancel-safe.
    pub(super) async fn next(&mut self) -> (u32, Result<Answer, Failure>) {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u32, Result<Answer, Failure>)> {
        for at in 0..self.0.len() {
            let (number, exchange) = &mut self.0[at];
            if let Poll::Ready(result) = exchange.as_mut().poll(cx) {
                let number = *number;
                drop(self.0.remove(at));
                return Poll::Ready((number, result));
            }
        }
        Poll::Pending
    }

    /// Ends the call of an attempt.
    pub(super) fn end(&mut self, number: u32) {
        self.0.retain(|(of, _)| *of != number);
    }

    /// Ends all calls.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
