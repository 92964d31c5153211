//! Moments at a fixed rate, kept by a kernel timer to some tens of microseconds.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// Tells when the next request is due.
#[derive(Debug)]
pub(crate) struct Pacer {
    timer: AsyncFd<OwnedFd>,
    started: Instant,
    interval: Duration,
    /// Moments told so far.
    told: u32,
    /// Moments that have passed and were not told yet.
    passed: u64,
}

impl Pacer {
    /// Starts now, with `per_second` moments a second.
    pub(crate) fn start(per_second: f64) -> io::Result<Self> {
        let interval = Duration::from_secs_f64(1.0 / per_second.max(0.001));
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let spec = Timespec {
            tv_sec: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let started = Instant::now();
        timerfd_settime(
            &timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: spec, it_value: spec },
        )?;
        let timer = AsyncFd::register_with_interest(timer, Interest::READABLE)?;
        Ok(Self { timer, started, interval, told: 0, passed: 0 })
    }

    /// Waits for the next moment and says when it was. Cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<Instant> {
        while self.passed == 0 {
            let mut ready = self.timer.readable().await?;
            let read = ready.try_io(|timer| {
                let mut count = [0_u8; 8];
                rustix::io::read(timer.get_ref(), &mut count)?;
                Ok(u64::from_ne_bytes(count))
            });
            match read {
                Ok(count) => self.passed += count?,
                Err(_would_block) => {}
            }
        }
        self.passed -= 1;
        self.told += 1;
        Ok(self.started + self.interval * self.told)
    }
}
