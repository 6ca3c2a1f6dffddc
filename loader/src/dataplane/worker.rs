//! A thread of the dataplane's own, beside the one that makes changes: it works now and then, or when it is woken.
//!
//! Waking it takes no lock, so it can be done in a copy of the process (fork(2)) too, where the thread is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The thread. It ends on drop, after what it is at.
#[derive(Debug)]
pub(super) struct Worker {
    calls: Arc<Calls>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is asked for.
#[derive(Debug, Default)]
pub(super) struct Calls {
    woken: AtomicBool,
    ended: AtomicBool,
}

/// Why a wait was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// There is something to do.
    Woken,
    /// As much time has passed as was said.
    Time,
    /// The thread is to end.
    End,
}

impl Worker {
    pub(super) fn start(work: impl FnOnce(&Calls) + Send + 'static) -> Self {
        let calls = Arc::<Calls>::default();
        let told = Arc::clone(&calls);
        Self { calls, thread: Some(thread::spawn(move || work(&told))) }
    }

    /// Has the thread work soon; once, however often it is asked before that. Does not wait for it.
    pub(super) fn wake(&self) {
        self.call(&self.calls.woken);
    }

    fn call(&self, which: &AtomicBool) {
        which.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.call(&self.calls.ended);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Calls {
    /// Waits for the next call, in the thread itself; this long at most.
    pub(super) fn wait(&self, time: Duration) -> Call {
        let began = Instant::now();
        loop {
            if self.ended.load(Ordering::Acquire) {
                return Call::End;
            }
            if self.woken.swap(false, Ordering::AcqRel) {
                return Call::Woken;
            }
            let Some(left) = time.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return Call::Time;
            };
            thread::park_timeout(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    /// A worker that tells of each call that it hears, waiting so long for it.
    fn told(wait: Duration) -> (Worker, mpsc::Receiver<Call>) {
        let (tell, calls) = mpsc::channel();
        let worker = Worker::start(move |calls| {
            loop {
                let call = calls.wait(wait);
                if tell.send(call).is_err() || call == Call::End {
                    return;
                }
            }
        });
        (worker, calls)
    }

    #[test]
    fn it_hears_calls_and_its_end_without_waiting_for_its_time() {
        let (worker, calls) = told(LONG);
        worker.wake();
        assert_eq!(calls.recv_timeout(LONG / 2), Ok(Call::Woken));
        worker.wake();
        assert_eq!(calls.recv_timeout(LONG / 2), Ok(Call::Woken));
        drop(worker);
        assert_eq!(calls.recv_timeout(LONG / 2), Ok(Call::End));
    }

    #[test]
    fn without_a_call_its_time_passes() {
        let (_worker, calls) = told(Duration::from_millis(1));
        assert_eq!(calls.recv_timeout(LONG / 2), Ok(Call::Time));
    }

    #[test]
    fn calls_while_it_works_are_one() {
        let (tell, counts) = mpsc::channel();
        let (begin, begun) = mpsc::channel::<()>();
        let worker = Worker::start(move |calls| {
            let _ = begun.recv();
            let heard = [calls.wait(LONG), calls.wait(Duration::from_millis(1))];
            let _ = tell.send(heard);
        });
        worker.wake();
        worker.wake();
        drop(begin);
        assert_eq!(counts.recv_timeout(LONG / 2), Ok([Call::Woken, Call::Time]));
    }
}
