//! How much a chatd has allocated, told by a small library that is loaded into it (`allocated.c`, which counts what glibc gives and gets back).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::process::Command;

use crate::chatd::Options;

/// The library, built, and the file that it writes.
#[derive(Debug)]
pub struct Allocated {
    folder: TempDir,
}

impl Allocated {
    /// Builds the library, with the C compiler that Rust links with.
    pub async fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("allocated-").tempdir()?;
        let this = Self { folder };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/allocated.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O2", "-Wall", "-pthread", "-o"]).arg(this.library()).arg(source);
        let status = compiler.status().await.context("cc, the C compiler")?;
        ensure!(status.success(), "cc: {status}");
        Ok(this)
    }

    fn library(&self) -> PathBuf {
        self.folder.path().join("allocated.so")
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("bytes")
    }

    /// With the library in it. Of one chatd at a time.
    pub fn of(&self, mut options: Options) -> Options {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        options.environment.push(("LD_PRELOAD".to_owned(), text(self.library())));
        options.environment.push(("ALLOCATED_FILE".to_owned(), text(self.file())));
        options
    }

    /// Bytes that are allocated, as of 10 ms ago.
    pub fn bytes(&self) -> Result<u64> {
        let line = std::fs::read_to_string(self.file()).context("the library has not written yet")?;
        line.trim().parse().with_context(|| format!("{line:?}"))
    }
}
