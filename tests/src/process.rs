//! Child processes that end with their guard, and whose output is kept for when a test fails.

use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::patience::patient;

/// A running child process; killed on drop. Its output is printed if the test is panicking then.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts a command with its output captured.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(output) = child.stdout.take() {
            readers.push(collect(output, Arc::clone(&log)));
        }
        if let Some(output) = child.stderr.take() {
            readers.push(collect(output, Arc::clone(&log)));
        }
        Ok(Self { name: name.into(), child, log, readers })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far, standard output and standard error together.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Waits until it has printed a line that contains `text`.
    ///
    /// # Errors
    /// If it ends or the time is up first; with its output.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let (started, limit) = (Instant::now(), patient(limit));
        while !self.log().contains(text) {
            self.check_alive()?;
            if started.elapsed() > limit {
                bail!("{} did not print {text:?} within {limit:?}:\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Fails if the process has ended.
    ///
    /// # Errors
    /// If it has; with its output.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            self.readers.drain(..).for_each(|reader| drop(reader.join()));
            bail!("{} ended: {status}\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// Waits for its end and returns its output.
    ///
    /// # Errors
    /// If it fails, or doesn't end in time.
    pub fn finish(mut self, limit: Duration) -> Result<String> {
        let (started, limit) = (Instant::now(), patient(limit));
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.readers.drain(..).for_each(|reader| drop(reader.join()));
                if status.success() {
                    return Ok(self.log());
                }
                bail!("{} failed: {status}\n{}", self.name, self.log());
            }
            if started.elapsed() > limit {
                bail!("{} did not end within {limit:?}:\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes no pointers. The child has not been waited for, or has and this fails: its id can't be another's
        // as long as `self.child` hasn't been reaped, and a reaped child is only seen by `check_alive` and `finish`.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
    }

    /// Kills it at once, as `kill -9` does, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// If it doesn't end in time or fails.
    pub fn stop(self, limit: Duration) -> Result<String> {
        self.signal(libc::SIGTERM);
        self.finish(limit)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- output of {} ----\n{}\n----", self.name, self.log());
        }
    }
}

fn collect(output: impl Read + Send + 'static, log: Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    })
}

/// A program that cargo built beside the running one: `sheave`, `probe`.
///
/// # Errors
/// If it isn't there.
pub fn built(program: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(program)).find(|file| file.is_file());
    found.with_context(|| format!("{program} is not built: `cargo xtask test` builds it, or `cargo build --bins`"))
}

/// Tries until it works, for things that take a moment.
///
/// # Errors
/// The last error, when the time is up.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let (started, limit) = (Instant::now(), patient(limit));
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if started.elapsed() > limit => return Err(error.context(format!("still so after {limit:?}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
