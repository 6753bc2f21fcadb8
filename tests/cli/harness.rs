//! Runs the binary in a folder of its own, with a time limit, and shows everything about a
//! run that did not go as it should.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// No run of these tests takes a fraction of this.
const LIMIT: Duration = Duration::from_secs(60);

/// A folder to run in. The names `store` and `model` in it are not counted as output.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    pub fn new() -> Bench {
        Bench { dir: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A path in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; {:?}", path.display(), self.files()))
    }

    pub fn write(&self, name: impl AsRef<Path>, data: impl AsRef<[u8]>) {
        fs::write(self.path(name), data).expect("a writable folder");
    }

    /// Everything a run may have left, sorted; folders end in `/`.
    pub fn files(&self) -> Vec<String> {
        fn list(dir: &Path, prefix: &str, names: &mut Vec<String>) {
            // A running program may remove a folder between two looks at it.
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                if ["store", "model"].contains(&name.as_str()) {
                    continue;
                }
                if entry.path().is_dir() {
                    names.push(format!("{name}/"));
                    list(&entry.path(), &format!("{name}/"), names);
                } else {
                    names.push(name);
                }
            }
        }
        let mut names = Vec::new();
        list(self.dir.path(), "", &mut names);
        names.sort();
        names
    }

    /// Copies a reference checkpoint to `model`, to be damaged; every call starts afresh.
    pub fn copy_model(&self, family: &str) -> PathBuf {
        let copy = self.path("model");
        if copy.exists() {
            fs::remove_dir_all(&copy).expect("removable");
        }
        let source = golden(family);
        for part in fs::read_dir(&source).expect("a checkpoint").flatten() {
            // Weights that somebody's run converted are no part of it.
            if part.file_name() == ".pyraflow" {
                continue;
            }
            // A link that was checked out as a file says where the folder is.
            let mut from = part.path();
            if part.file_name().to_string_lossy().starts_with("tokenizer") && from.is_file() {
                from = source.join(fs::read_to_string(&from).expect("a path").trim());
            }
            if from.is_dir() {
                let to = copy.join(part.file_name());
                fs::create_dir_all(&to).expect("a folder");
                for file in fs::read_dir(&from).expect("a folder").flatten() {
                    if file.path().is_file() {
                        fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
                    }
                }
            }
        }
        copy
    }

    /// The binary, to be run in the folder.
    pub fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pyraflow"));
        command.args(args);
        self.prepare(command)
    }

    /// The same through a shell that runs `first` before it becomes the binary.
    pub fn shell(&self, first: &str, args: &Generate) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{first}; exec \"$@\"")).arg("sh");
        command.arg(env!("CARGO_BIN_EXE_pyraflow")).args(args.args());
        self.prepare(command)
    }

    /// The same for any command.
    pub fn prepare(&self, mut command: Command) -> Command {
        command.current_dir(self.dir.path());
        // Nor should settings of whoever runs the tests count.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PYRAFLOW_") {
                command.env_remove(name);
            }
        }
        command.env("XDG_CONFIG_HOME", self.path("config"));
        // No model of the user's is found.
        command.env("HF_HOME", self.path("store"));
        command.env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a run.
    pub fn start(&self, command: Command) -> Running<'_> {
        Running::new(self, command)
    }

    /// Runs to the end.
    pub fn run(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        self.start(self.command(args)).finish()
    }

    /// `generate`, to the end.
    pub fn generate(&self, args: &Generate) -> Run {
        self.run(args.args())
    }

    /// `generate` must refuse this with `code` and a message that holds all of `parts`,
    /// before it computes anything, and leave nothing behind.
    #[track_caller]
    pub fn refuses(&self, args: &Generate, code: i32, parts: &[&str]) {
        let before = self.files();
        let run = self.generate(&args.clone().flag("--json"));
        run.check(run.code() == Some(code), &format!("exit code {code}"));
        for part in parts {
            run.check(run.stderr.contains(part), &format!("{part:?} in the message"));
        }
        run.check(run.stderr.contains("error: "), "an error message");
        let computing = |event: &Value| event["phase"].is_string() && event["phase"] != "loading";
        run.check(!run.events().iter().any(computing), "no computation");
        run.check(self.files() == before, &format!("the files {before:?} and no more"));
    }
}

/// A reference checkpoint, not to be changed.
pub fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(family)
}

/// The arguments of a `generate` that takes a moment: two units of 64×64.
#[derive(Debug, Clone)]
pub struct Generate {
    prompt: Option<OsString>,
    options: Vec<(String, Option<OsString>)>,
}

impl Generate {
    pub fn new() -> Generate {
        let ask = Generate { prompt: Some("a fox".into()), options: Vec::new() };
        ask.set("--model", golden("sd3"))
            .set("--store", "store")
            .set("--size", "64x64")
            .flag("--force")
            .set("--units", "2")
            .set("--steps", "1")
            .set("--video-steps", "1")
            .set("--seed", "1")
            .set("-o", "out.mp4")
    }

    pub fn to(output: impl Into<OsString>) -> Generate {
        Generate::new().set("-o", output)
    }

    pub fn prompt(mut self, prompt: impl Into<OsString>) -> Generate {
        self.prompt = Some(prompt.into());
        self
    }

    pub fn no_prompt(mut self) -> Generate {
        self.prompt = None;
        self
    }

    pub fn set(self, name: &str, value: impl Into<OsString>) -> Generate {
        let mut ask = self.without(name);
        ask.options.push((name.into(), Some(value.into())));
        ask
    }

    pub fn flag(self, name: &str) -> Generate {
        let mut ask = self.without(name);
        ask.options.push((name.into(), None));
        ask
    }

    pub fn without(mut self, name: &str) -> Generate {
        self.options.retain(|(n, _)| n != name);
        self
    }

    pub fn args(&self) -> Vec<OsString> {
        let mut args = vec!["generate".into()];
        args.extend(self.prompt.clone());
        for (name, value) in &self.options {
            args.push(name.into());
            args.extend(value.clone());
        }
        args
    }
}

/// A run that goes on.
pub struct Running<'a> {
    bench: &'a Bench,
    pub child: Child,
    command: String,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    started: Instant,
}

impl<'a> Running<'a> {
    fn new(bench: &'a Bench, mut command: Command) -> Running<'a> {
        let mut shown = format!("{command:?}");
        if let Some((end, _)) = shown.char_indices().nth(2000) {
            shown.truncate(end);
        }
        let mut child = command.spawn().expect("the binary starts");
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        Running { bench, child, command: shown, stdout, stderr, started: Instant::now() }
    }

    /// Waits until `name` is there; false if the run ended first.
    pub fn wait_for(&mut self, mut name: impl FnMut(&[String]) -> bool) -> bool {
        while self.started.elapsed() < LIMIT {
            if name(&self.bench.files()) {
                return true;
            }
            if self.child.try_wait().expect("a status").is_some() {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Sends a signal, such as `INT`.
    pub fn signal(&mut self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh").arg("-c").arg(kill).status().expect("a shell");
        assert!(status.success(), "the run is still there");
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Run {
        let status = loop {
            match self.child.try_wait().expect("a status") {
                Some(status) => break Some(status),
                None if self.started.elapsed() > LIMIT => {
                    self.child.kill().expect("killed");
                    self.child.wait().expect("a status");
                    break None;
                }
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        let run = Run {
            command: self.command,
            status,
            stdout: self.stdout.join().expect("standard output"),
            stderr: String::from_utf8_lossy(&self.stderr.join().expect("errors")).into_owned(),
            files: self.bench.files(),
        };
        run.check(run.status.is_some(), &format!("an end within {LIMIT:?}"));
        run.check(!run.stderr.contains("panicked"), "no panic");
        run.check(run.code() != Some(101), "no exit code of a panic");
        run
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut data = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut data).expect("a readable pipe");
        }
        data
    })
}

/// A run that is over.
#[derive(Debug)]
pub struct Run {
    command: String,
    status: Option<ExitStatus>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    files: Vec<String>,
}

impl Run {
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|s| s.code())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output as JSON lines.
    pub fn events(&self) -> Vec<Value> {
        let parse = |line: &str| {
            serde_json::from_str(line)
                .unwrap_or_else(|e| panic!("{line:?} is no JSON: {e}\n{self}"))
        };
        self.text().lines().map(parse).collect()
    }

    #[track_caller]
    pub fn check(&self, right: bool, wanted: &str) {
        assert!(right, "wanted: {wanted}\n{self}");
    }

    #[track_caller]
    pub fn ok(self) -> Run {
        self.check(self.code() == Some(0), "success");
        self
    }

    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> Run {
        self.check(self.code() == Some(code), &format!("exit code {code}"));
        for part in parts {
            self.check(self.stderr.contains(part), &format!("{part:?} in the message"));
        }
        self
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text();
        let shown: String = text.chars().take(4000).collect();
        let errors: String = self.stderr.chars().take(4000).collect();
        write!(
            f,
            "command: {}\nstatus: {:?}\nfiles: {:?}\nstdout ({} bytes): {shown}\nstderr: {errors}",
            self.command,
            self.status,
            self.files,
            self.stdout.len(),
        )
    }
}
