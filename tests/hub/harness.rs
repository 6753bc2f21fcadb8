//! A cache of one's own, pulls into it, and the checkpoints that the server has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pyraflow::Result;
use pyraflow::hub::{
    Event, Hub, Manifest, ManifestFile, Outcome, PullOptions, Pulled, Settings, Token, Tries,
    Watcher,
};
use tempfile::TempDir;

use crate::server::{COMMIT, Files, Server};

/// A cache folder.
pub struct Cache {
    dir: TempDir,
}

/// Remembers what a pull told.
#[derive(Default)]
pub struct Told(pub Vec<Event>);

impl Watcher for Told {
    fn event(&mut self, event: &Event) {
        self.0.push(event.clone());
    }
}

impl Told {
    pub fn outcomes(&self) -> Vec<(String, Outcome)> {
        let file = |event: &Event| match event {
            Event::File { path, outcome, .. } => Some((path.clone(), *outcome)),
            _ => None,
        };
        let mut files: Vec<_> = self.0.iter().filter_map(file).collect();
        files.sort_by(|a, b| a.0.cmp(&b.0));
        files
    }
}

/// As stubborn as a test has time for, and without conversion.
pub fn options(most: u32) -> PullOptions {
    let tries = Tries { most, pause: Duration::from_millis(1) };
    PullOptions { convert: false, tries, ..PullOptions::default() }
}

impl Cache {
    pub fn new() -> Cache {
        Cache { dir: tempfile::tempdir().expect("a folder") }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn settings(&self, server: &Server) -> Settings {
        Settings {
            endpoint: server.endpoint(),
            cache: self.path().join("hub"),
            token: None,
            offline: false,
        }
    }

    pub fn hub(&self, server: &Server) -> Hub {
        Hub::new(self.settings(server))
    }

    pub fn hub_with_token(&self, server: &Server, token: &str) -> Hub {
        let token = Some(Token::new(token).expect("a token"));
        Hub::new(Settings { token, ..self.settings(server) })
    }

    /// Pulls the server's one file, asking again so many times.
    pub fn pull_one(&self, server: &Server, most: u32) -> Result<Pulled> {
        self.hub(server).pull(
            &manifest(&["folder/weights.bin"]),
            &options(most),
            &mut Told::default(),
        )
    }

    fn repo(&self) -> PathBuf {
        self.path().join("hub/models--owner--name")
    }

    pub fn file(&self, path: &str) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT).join(path)
    }

    /// The file is as it should be, and nothing else is left of its download.
    #[track_caller]
    pub fn has(&self, path: &str, contents: &[u8]) {
        let found = fs::read(self.file(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(found == contents, "{path} has {} bytes, not the right ones", found.len());
        assert_eq!(self.partials(), Vec::<u64>::new(), "no partial download is left");
    }

    /// There is no file of that name.
    #[track_caller]
    pub fn lacks(&self, path: &str) {
        assert!(fs::symlink_metadata(self.file(path)).is_err(), "{path} is there");
    }

    /// The lengths of partial downloads.
    pub fn partials(&self) -> Vec<u64> {
        let entries = fs::read_dir(self.repo().join("blobs")).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().ends_with(".incomplete"))
            .map(|entry| entry.metadata().map_or(0, |m| m.len()))
            .collect()
    }

    /// The names of whole blobs.
    pub fn blobs(&self) -> Vec<String> {
        let entries = fs::read_dir(self.repo().join("blobs")).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.ends_with(".incomplete"));
        names.sort();
        names
    }

    /// The binary with this cache and that server, and nothing of the user's.
    pub fn command(&self, server: &Server, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pyraflow"));
        command.args(args);
        self.prepare(command, server)
    }

    /// The same through a shell that runs `first` before it becomes the binary.
    pub fn shell(&self, server: &Server, first: &str, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{first}; exec \"$@\"")).arg("sh");
        command.arg(env!("CARGO_BIN_EXE_pyraflow")).args(args);
        self.prepare(command, server)
    }

    fn prepare(&self, mut command: Command, server: &Server) -> Command {
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"] {
            command.env_remove(name);
        }
        // Nor should settings of whoever runs the tests count.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PYRAFLOW_") {
                command.env_remove(name);
            }
        }
        command.env("XDG_CONFIG_HOME", self.path().join("config"));
        command.env("HF_HOME", self.path()).env("HF_ENDPOINT", server.endpoint());
        command.env("NO_PROXY", "127.0.0.1").env("RUST_BACKTRACE", "0");
        command.current_dir(self.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the binary to its end.
    pub fn run(&self, server: &Server, args: &[&str]) -> Ran {
        Ran::new(self.command(server, args))
    }
}

/// The manifest of some files of the server, with nothing pinned but the commit.
pub fn manifest(paths: &[&str]) -> Manifest {
    let file = |path: &&str| ManifestFile { path: path.to_string(), bytes: None, sha256: None };
    Manifest {
        repo: "owner/name".parse().expect("a name"),
        revision: COMMIT.to_owned(),
        reference: None,
        files: paths.iter().map(file).collect(),
    }
}

/// The files of a small reference checkpoint, under their published names.
pub fn checkpoint(family: &str) -> Files {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(family);
    let mut files = Files::new();
    for part in fs::read_dir(&root).expect("a checkpoint").flatten() {
        let folder = part.file_name().into_string().expect("a name");
        let mut from = part.path();
        // A link that was checked out as a file says where the folder is.
        if folder.starts_with("tokenizer") && from.is_file() {
            from = root.join(fs::read_to_string(&from).expect("a path").trim());
        }
        if !from.is_dir() || folder == ".pyraflow" {
            continue;
        }
        for file in fs::read_dir(&from).expect("a folder").flatten() {
            let name = file.file_name().into_string().expect("a name");
            let contents = fs::read(file.path()).expect("a file");
            files.insert(format!("{folder}/{name}"), Arc::new(contents));
        }
    }
    assert!(files.len() > 10, "{family} has {} files", files.len());
    files
}

/// What a run of the binary did.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn new(mut command: Command) -> Ran {
        Ran::of(command.output().expect("the binary starts"))
    }

    pub fn of(output: Output) -> Ran {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let ran =
            Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!ran.err.contains("panicked"), "{ran:?}");
        ran
    }

    #[track_caller]
    pub fn ok(self) -> Ran {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// It failed with this code and told all of `parts`.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> Ran {
        assert_eq!(self.code, Some(code), "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in {self:?}");
        }
        self
    }

    pub fn events(&self) -> Vec<serde_json::Value> {
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.out.lines().map(parse).collect()
    }
}

/// The error of a pull that must fail: its kind's exit code, what it says and what to do.
#[track_caller]
pub fn refused(result: Result<Pulled>, code: u8, parts: &[&str]) -> String {
    let error = result.expect_err("this must fail");
    let hint = error.hint_text().unwrap_or_else(|| panic!("no hint: {error}"));
    let text = format!("{error} | {hint}");
    assert_eq!(error.kind().exit_code(), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    text
}
