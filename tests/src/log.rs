//! What code under test logs on the thread of the test.

use std::io;
use std::sync::{Arc, Mutex};

/// What is logged on this thread. A `#[tokio::test]` has one thread, so that is what its tasks say.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Lines so far that contain a text.
    ///
    /// # Panics
    /// If a writer panicked.
    #[must_use]
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        let log = self.0.lock().expect("nobody panicked");
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }

    /// Begins to listen, until the guard is dropped.
    #[must_use]
    pub fn follow(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panicked").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
