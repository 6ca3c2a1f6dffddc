//! A build of `sheave` whose programs the kernel has not seen yet.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::leftovers::unique_name;
use crate::process::built;

/// Another build of the program, in a folder that is removed on drop.
#[derive(Debug)]
pub struct OtherBuild {
    folder: PathBuf,
}

impl OtherBuild {
    /// Makes it of the one that is built: the name of the compiler in the BPF object's debug information is written otherwise.
    ///
    /// # Errors
    /// If that is not built, or there is no such information in it.
    pub fn make() -> Result<Self> {
        const COMPILER: &[u8] = b"clang LLVM (rustc version";
        let other = Self { folder: std::env::temp_dir().join(unique_name()) };
        fs::create_dir(&other.folder)?;
        // The copy has its permissions; what it holds is written afterwards.
        fs::copy(built("sheave")?, other.program())?;
        let mut octets = fs::read(other.program())?;
        let places: Vec<usize> =
            (0..octets.len() - COMPILER.len()).filter(|place| octets[*place..].starts_with(COMPILER)).collect();
        ensure!(!places.is_empty(), "no BPF object's debug information in the program");
        places.into_iter().for_each(|place| octets[place] = b'C');
        fs::write(other.program(), octets)?;
        Ok(other)
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.folder.join("sheave")
    }
}

impl Drop for OtherBuild {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
