//! Compiles the CUDA kernels, if there is an nvcc to do it, and lists the results for
//! `src/exec/cuda/images.rs`. What was compiled stays in `OUT_DIR` under a name that holds a
//! hash of everything it depends on, so that only what changed is compiled again.
//!
//! `PYRAFLOW_NVCC` names the compiler; otherwise `CUDA_HOME`, `CUDA_PATH`, `PATH` and the
//! folder that `tools/install-nvcc` fills are searched. `PYRAFLOW_CUDA_ARCHS` lists the
//! architectures (see `build/archs.rs`); `none` leaves the kernels out.

#[path = "build/archs.rs"]
mod archs;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::{env, fs, thread};

use archs::Arch;
use nvcc::{Job, Nvcc};

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    for file in ["build.rs", "build"] {
        println!("cargo::rerun-if-changed={file}");
    }
    for name in ["PYRAFLOW_NVCC", "PYRAFLOW_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = Path::new("kernels");
    if !kernels.is_dir() {
        return list(&out, None, &[]);
    }
    println!("cargo::rerun-if-changed=kernels");
    let named = env::var("PYRAFLOW_CUDA_ARCHS").ok();
    let mut archs = Arch::parse_list(named.as_deref().unwrap_or(archs::DEFAULT))
        .map_err(|e| format!("PYRAFLOW_CUDA_ARCHS: {e}"))?;
    if archs.is_empty() {
        return list(&out, None, &[]);
    }
    let Some(nvcc) = Nvcc::find()? else {
        println!(
            "cargo::warning=no nvcc was found: this build runs on the CPU only. For NVIDIA GPUs \
             run tools/install-nvcc, or set PYRAFLOW_NVCC or CUDA_HOME, and build again; \
             PYRAFLOW_CUDA_ARCHS=none silences this"
        );
        return list(&out, None, &[]);
    };
    let unknown = nvcc.unknown(&archs);
    if !unknown.is_empty() {
        let names: Vec<String> = unknown.iter().map(Arch::to_string).collect();
        let message = format!("{nvcc} does not know {}", names.join(", "));
        if named.is_some() {
            return Err(format!("PYRAFLOW_CUDA_ARCHS: {message}"));
        }
        println!("cargo::warning={message}: GPUs of these architectures are left out");
        archs.retain(|arch| !unknown.contains(arch));
    }

    let mut sources = files(kernels, "cu")?;
    sources.sort();
    let mut headers = files(&kernels.join("lib"), "cuh")?;
    headers.sort();
    let headers = nvcc::hash_of(&headers)?;
    let mut jobs = Vec::new();
    for source in &sources {
        for &arch in archs.iter().filter(|&&arch| wanted(source, arch)) {
            jobs.push(Job::new(&nvcc, source, arch, headers, &out)?);
        }
    }
    compile(&nvcc, &jobs)?;
    remove_old(&out, &jobs)?;
    list(&out, Some(&nvcc), &jobs)
}

/// Files that are named after an architecture are for this one only.
fn wanted(source: &Path, arch: Arch) -> bool {
    let hopper = Arch { number: 90, accelerated: true, ptx: false };
    !nvcc::stem(source).ends_with("_sm90") || arch == hopper
}

/// The files of a folder with an extension.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect())
}

/// Compiles what is not there yet, as many at a time as cargo allows, and reports all
/// warnings. The first error ends it.
fn compile(nvcc: &Nvcc, jobs: &[Job]) -> Result<()> {
    let queue: Mutex<VecDeque<&Job>> = Mutex::new(jobs.iter().filter(|j| !j.is_done()).collect());
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
    let next = || queue.lock().map_or(None, |mut queue| queue.pop_front());
    let work = || -> Result<()> {
        while let Some(job) = next() {
            if let Err(error) = job.run(nvcc) {
                if let Ok(mut queue) = queue.lock() {
                    queue.clear();
                }
                return Err(error);
            }
        }
        Ok(())
    };
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|result| result.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    for job in jobs {
        for warning in job.warnings() {
            println!("cargo::warning={} for {}: {warning}", job.source.display(), job.arch);
        }
    }
    Ok(())
}

/// Removes what was compiled from what the sources no longer are. The same for architectures
/// that this build leaves out stays: they may be wanted again.
fn remove_old(out: &Path, jobs: &[Job]) -> Result<()> {
    let current: BTreeSet<(String, String)> = jobs.iter().map(Job::version).collect();
    for extension in nvcc::EXTENSIONS {
        for file in files(out, extension)? {
            let name = nvcc::stem(&file);
            let mut parts = name.splitn(3, '-');
            let (source, _, hash) = (parts.next(), parts.next(), parts.next());
            let version = source.zip(hash).map(|(a, b)| (a.to_string(), b.to_string()));
            if version.is_none_or(|version| !current.contains(&version)) {
                fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// Writes the list that `images.rs` includes.
fn list(out: &Path, nvcc: Option<&Nvcc>, jobs: &[Job]) -> Result<()> {
    let mut text = String::new();
    for job in jobs {
        let file = job.output.to_str().ok_or("OUT_DIR is not UTF-8")?;
        let _ = writeln!(
            text,
            "    Image {{ file: {:?}, arch: {:?}, ptx: {}, bytes: &Aligned(*include_bytes!({file:?})).0 }},",
            nvcc::stem(&job.source),
            job.arch.name(),
            job.arch.ptx,
        );
    }
    let version = nvcc.map(|nvcc| nvcc.version.as_str());
    let text = format!(
        "/// The nvcc that compiled the kernels, if there are any.\n\
         pub const NVCC_VERSION: Option<&str> = {version:?};\n\n\
         /// Every kernel file, compiled for every architecture of this build.\n\
         pub static IMAGES: &[Image] = &[\n{text}];\n"
    );
    let path = out.join("kernels.rs");
    fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
}
