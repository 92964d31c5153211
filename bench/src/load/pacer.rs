//! Times at a fixed rate, kept by a kernel timer to some tens of microseconds.

use std::io;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};
use tokio::net::unix::pipe::Receiver;
use tokio::time::Instant;

/// Tells when the next request is due.
#[derive(Debug)]
pub(crate) struct Pacer {
    timer: Receiver,
    started: Instant,
    interval: Duration,
    /// The number of times returned.
    told: u32,
    /// Times that have passed and were not returned.
    passed: u64,
}

impl Pacer {
    /// Starts now, with this number of times per second.
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
        // To the runtime a timer is like the reading end of a pipe: readable, then read.
        let timer = Receiver::from_owned_fd_unchecked(timer)?;
        Ok(Self { timer, started, interval, told: 0, passed: 0 })
    }

    /// Waits for the next time and returns it. Cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<Instant> {
        while self.passed == 0 {
            self.timer.readable().await?;
            let mut count = [0_u8; 8];
            match self.timer.try_read(&mut count) {
                Ok(_) => self.passed += u64::from_ne_bytes(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        self.passed -= 1;
        self.told += 1;
        Ok(self.started + self.interval * self.told)
    }
}
