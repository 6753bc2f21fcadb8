//! Finds nvcc and runs it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fmt, fs};

use crate::Result;
use crate::archs::Arch;

/// No fast-math: where a kernel can do with less precision, it says so itself.
const FLAGS: &[&str] = &["-std=c++17", "-O3", "-lineinfo"];
/// For machine code, which ptxas makes; PTX ends before it.
const PTXAS_FLAGS: &[&str] = &["-Xptxas=-v,-warn-spills"];

/// The endings of everything that a [`Job`] writes.
pub const EXTENSIONS: &[&str] = &["cubin", "ptx", "log"];

/// A compiler that runs.
pub struct Nvcc {
    path: PathBuf,
    /// Such as `13.0.88`.
    pub version: String,
    /// What it can compile for: 80, 86 and so on.
    known: Vec<u32>,
}

impl fmt::Display for Nvcc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nvcc {} ({})", self.version, self.path.display())
    }
}

impl Nvcc {
    /// Searches for nvcc. One that is named but does not run is an error.
    pub fn find() -> Result<Option<Nvcc>> {
        if let Some(path) = env::var_os("PYRAFLOW_NVCC").filter(|path| !path.is_empty()) {
            return Nvcc::open(path.into()).map(Some).map_err(|e| format!("PYRAFLOW_NVCC: {e}"));
        }
        let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
        let toolkits = toolkits.map(|folder| PathBuf::from(folder).join("bin/nvcc"));
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
        let mut places = toolkits.chain(on_path).chain(installed());
        places.find(|path| path.is_file()).map(Nvcc::open).transpose()
    }

    fn open(path: PathBuf) -> Result<Nvcc> {
        let ask = |question: &str| -> Result<String> {
            let Output { status, stdout, stderr } = Command::new(&path)
                .arg(question)
                .output()
                .map_err(|e| format!("cannot run {}: {e}", path.display()))?;
            let stdout = String::from_utf8_lossy(&stdout).into_owned();
            if status.success() {
                return Ok(stdout);
            }
            let stderr = String::from_utf8_lossy(&stderr);
            Err(format!("{} {question}: {status}\n{stdout}{stderr}", path.display()))
        };
        let answer = ask("--version")?;
        let version = answer
            .split_once(", V")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .ok_or_else(|| format!("{} is no nvcc:\n{answer}", path.display()))?
            .to_string();
        let codes = ask("--list-gpu-code")?;
        let known = codes.lines().filter_map(|line| line.strip_prefix("sm_")?.parse().ok());
        Ok(Nvcc { known: known.collect(), version, path })
    }

    /// Those of `archs` that this compiler is too old or too new for.
    pub fn unknown(&self, archs: &[Arch]) -> Vec<Arch> {
        archs.iter().copied().filter(|arch| !self.known.contains(&arch.number)).collect()
    }
}

/// Where `tools/install-nvcc` puts it.
fn installed() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("pyraflow/nvcc/nvidia/cu13/bin/nvcc"))
}

/// The name of a kernel file without its extension.
pub fn stem(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// A hash of the names and the contents of files.
pub fn hash_of(files: &[PathBuf]) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.hash(&mut hasher);
        fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// One file to be compiled for one architecture.
pub struct Job {
    pub source: PathBuf,
    pub arch: Arch,
    hash: String,
    /// Machine code, or PTX with a zero at the end, which the driver expects.
    pub output: PathBuf,
    /// What nvcc said: registers, shared memory, spills.
    log: PathBuf,
}

impl Job {
    /// `headers` is a hash of every file that `source` may include.
    pub fn new(nvcc: &Nvcc, source: &Path, arch: Arch, headers: u64, out: &Path) -> Result<Job> {
        let mut hasher = DefaultHasher::new();
        (hash_of(&[source.to_path_buf()])?, headers, &nvcc.version).hash(&mut hasher);
        (FLAGS, PTXAS_FLAGS).hash(&mut hasher);
        let hash = format!("{:016x}", hasher.finish());
        let name = format!("{}-{arch}-{hash}", stem(source));
        let file = |extension: &str| out.join(format!("{name}.{extension}"));
        let output = file(if arch.ptx { "ptx" } else { "cubin" });
        Ok(Job { source: source.to_path_buf(), arch, hash, output, log: file("log") })
    }

    /// Whether there is nothing left to do.
    pub fn is_done(&self) -> bool {
        self.output.is_file()
    }

    /// The name of the source and the hash of all that the output depends on.
    pub fn version(&self) -> (String, String) {
        (stem(&self.source), self.hash.clone())
    }

    /// Runs nvcc; the output is complete or absent.
    pub fn run(&self, nvcc: &Nvcc) -> Result<()> {
        let failed = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
        let partial = self.output.with_extension("partial");
        let name = self.arch.name();
        let mut command = Command::new(&nvcc.path);
        command.args(FLAGS);
        if self.arch.ptx {
            command.arg("-ptx").arg(format!("-arch=compute_{name}"));
        } else {
            command.args(PTXAS_FLAGS).arg("-cubin");
            command.arg(format!("-gencode=arch=compute_{name},code=sm_{name}"));
        }
        command.arg("-o").arg(&partial).arg(&self.source);
        let Output { status, stdout, stderr } =
            command.output().map_err(|e| format!("cannot run {nvcc}: {e}"))?;
        let said = [stdout, stderr].concat();
        if !status.success() {
            let said = String::from_utf8_lossy(&said);
            return Err(format!(
                "{nvcc} cannot compile {} for {}\n{command:?}\n{said}",
                self.source.display(),
                self.arch
            ));
        }
        fs::write(&self.log, said).map_err(|e| failed(&self.log, e))?;
        if self.arch.ptx {
            let mut text = fs::read(&partial).map_err(|e| failed(&partial, e))?;
            text.push(0);
            fs::write(&partial, text).map_err(|e| failed(&partial, e))?;
        }
        fs::rename(&partial, &self.output).map_err(|e| failed(&self.output, e))
    }

    /// What the compiler warned of, when it ran: spilled registers above all.
    pub fn warnings(&self) -> Vec<String> {
        let log = fs::read(&self.log).unwrap_or_default();
        let lines = String::from_utf8_lossy(&log);
        lines.lines().filter(|line| line.contains("warning")).map(|l| l.trim().into()).collect()
    }
}
