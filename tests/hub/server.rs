//! A hub on loopback: one address for the hub, another for the large files it redirects to.
//! A script may answer any request in its own way.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that every repository here is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of at least so many bytes are "large": known by SHA-256 and kept elsewhere.
pub const LARGE: usize = 4096;

pub type Files = BTreeMap<String, Arc<Vec<u8>>>;

/// Which of the two addresses was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Hub,
    Storage,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub at: At,
    pub method: String,
    pub path: String,
    pub range: Option<u64>,
    pub token: Option<String>,
    /// How many requests there were before this one.
    pub number: usize,
}

impl Request {
    /// A download of a file whose name ends so.
    pub fn gets(&self, name: &str) -> bool {
        self.method == "GET" && self.path.split('?').next().is_some_and(|p| p.ends_with(name))
    }
}

/// How a request is answered if not as usual.
#[derive(Debug, Clone)]
pub enum Act {
    /// This and nothing else.
    Answer(u16, Vec<(String, String)>, Vec<u8>),
    /// As usual, but the connection ends after so many bytes of the body.
    Cut(usize),
    /// As usual, but as if no range had been asked for.
    WithoutRange,
    /// As usual, but with this `Content-Range`.
    Range(String),
    /// As usual, with these contents instead.
    Contents(Arc<Vec<u8>>),
}

impl Act {
    pub fn status(code: u16, headers: &[(&str, &str)]) -> Act {
        let headers = headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        Act::Answer(code, headers, Vec::new())
    }
}

type Script = Box<dyn FnMut(&Request) -> Option<Act> + Send>;

#[derive(Default)]
struct State {
    files: Files,
    log: Vec<Request>,
    script: Option<Script>,
    /// Body bytes of files that were sent.
    sent: u64,
    /// Time taken by every 16 KiB.
    pause: Duration,
}

pub struct Server {
    state: Arc<Mutex<State>>,
    hub: SocketAddr,
    storage: SocketAddr,
    stopped: Arc<AtomicBool>,
}

impl Server {
    pub fn new(files: Files) -> Server {
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a port");
        let (hub, storage) = (listen(), listen());
        let address = |listener: &TcpListener| listener.local_addr().expect("an address");
        let server = Server {
            state,
            hub: address(&hub),
            storage: address(&storage),
            stopped: Arc::default(),
        };
        server.serve(hub, At::Hub);
        server.serve(storage, At::Storage);
        server
    }

    /// One file, `weights.bin` in a folder, of so many bytes.
    pub fn with_one(bytes: usize) -> (Server, Arc<Vec<u8>>) {
        let contents = Arc::new(noise(bytes));
        let files = Files::from([("folder/weights.bin".to_owned(), Arc::clone(&contents))]);
        (Server::new(files), contents)
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.hub)
    }

    pub fn storage(&self) -> String {
        format!("http://{}", self.storage)
    }

    /// Answers requests by `script` where it returns something.
    pub fn script(&self, script: impl FnMut(&Request) -> Option<Act> + Send + 'static) {
        self.lock().script = Some(Box::new(script));
    }

    pub fn no_script(&self) {
        self.lock().script = None;
    }

    /// Sends 16 KiB per `pause`.
    pub fn slow(&self, pause: Duration) {
        self.lock().pause = pause;
    }

    pub fn set(&self, path: &str, contents: Vec<u8>) {
        self.lock().files.insert(path.to_owned(), Arc::new(contents));
    }

    pub fn log(&self) -> Vec<Request> {
        self.lock().log.clone()
    }

    /// Where the downloads of a file began, in order.
    pub fn starts(&self, name: &str) -> Vec<u64> {
        let log = self.log();
        let gets = log.iter().filter(|r| r.at == At::Storage && r.gets(&sha_of(self, name)));
        gets.map(|r| r.range.unwrap_or(0)).collect()
    }

    /// Body bytes of files sent so far.
    pub fn sent(&self) -> u64 {
        self.lock().sent
    }

    pub fn forget(&self) {
        let mut state = self.lock();
        state.log.clear();
        state.sent = 0;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panicked while it held this")
    }

    fn serve(&self, listener: TcpListener, at: At) {
        let (state, storage) = (Arc::clone(&self.state), self.storage());
        let stopped = Arc::clone(&self.stopped);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (state, storage) = (Arc::clone(&state), storage.clone());
                // A client that goes away is no concern of the server's.
                thread::spawn(move || answer(stream, at, &state, &storage));
            }
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        for address in [self.hub, self.storage] {
            let _ = TcpStream::connect(address);
        }
    }
}

fn sha_of(server: &Server, name: &str) -> String {
    let state = server.lock();
    let (_, contents) =
        state.files.iter().find(|(path, _)| path.ends_with(name)).expect("such a file");
    sha256(contents)
}

/// Bytes without a pattern that a wrong offset would leave unnoticed.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ bytes as u64;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn sha256(contents: &[u8]) -> String {
    hex(&Sha256::digest(contents))
}

/// The hub's tag of a file: SHA-256 of large ones, Git's name of small ones.
pub fn etag(contents: &[u8]) -> String {
    if contents.len() >= LARGE {
        return sha256(contents);
    }
    let header = format!("blob {}\0", contents.len());
    hex(&Sha1::new_with_prefix(header).chain_update(contents).finalize())
}

fn answer(stream: TcpStream, at: At, state: &Mutex<State>, storage: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = value.trim().strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => token = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut locked = state.lock().ok()?;
    let number = locked.log.len();
    let request = Request { at, method, path, range, token, number };
    locked.log.push(request.clone());
    let act = locked.script.as_mut().and_then(|script| script(&request));
    let files = locked.files.clone();
    drop(locked);
    let body = request.method != "HEAD";
    let mut out = Out { stream, state, limit: usize::MAX, body };
    if let Some(Act::Answer(code, headers, body)) = act {
        return out.send(code, &headers, &body, false);
    }
    match (at, request.path.split('?').next()?) {
        (At::Hub, path) if path.starts_with("/api/models/") => {
            let names: Vec<_> = files.keys().map(|name| json!({ "rfilename": name })).collect();
            let listing = json!({ "sha": COMMIT, "siblings": names }).to_string();
            out.send(200, &[header("Content-Type", "application/json")], listing.as_bytes(), false)
        }
        (At::Hub, path) => {
            let name = path.split_once("/resolve/")?.1.split_once('/')?.1;
            let Some(contents) = files.get(&unescape(name)) else {
                return out.send(404, &[header("X-Error-Code", "EntryNotFound")], b"", false);
            };
            let contents = match &act {
                Some(Act::Contents(other)) => other,
                _ => contents,
            };
            let tag = etag(contents);
            let commit = header("X-Repo-Commit", COMMIT);
            if contents.len() < LARGE {
                let headers = [commit, header("ETag", format!("\"{tag}\""))];
                return out.file(&headers, contents, &request, act.clone());
            }
            let headers = [
                commit,
                header("X-Linked-Etag", format!("\"{tag}\"")),
                header("X-Linked-Size", contents.len().to_string()),
                header("Location", format!("{storage}/{tag}?signature=secret")),
            ];
            out.send(302, &headers, b"moved", false)
        }
        (At::Storage, path) => {
            let name = path.trim_start_matches('/');
            let found = files.values().find(|contents| sha256(contents) == name);
            match (&act, found) {
                (Some(Act::Contents(other)), _) => {
                    let other = Arc::clone(other);
                    out.file(&[], &other, &request, act)
                }
                (_, Some(contents)) => out.file(&[], contents, &request, act),
                (_, None) => out.send(404, &[], b"", false),
            }
        }
    }
}

fn header(name: &str, value: impl Into<String>) -> (String, String) {
    (name.to_owned(), value.into())
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let hex = if byte == b'%' {
            let pair: Vec<u8> = bytes.by_ref().take(2).collect();
            u8::from_str_radix(&String::from_utf8_lossy(&pair), 16).ok()
        } else {
            Some(byte)
        };
        out.extend(hex);
    }
    String::from_utf8_lossy(&out).into_owned()
}

struct Out<'a> {
    stream: TcpStream,
    state: &'a Mutex<State>,
    /// Bytes of the body after which the connection ends.
    limit: usize,
    body: bool,
}

impl Out<'_> {
    /// A file, or the part of it that was asked for.
    fn file(
        &mut self,
        headers: &[(String, String)],
        contents: &[u8],
        request: &Request,
        act: Option<Act>,
    ) -> Option<()> {
        let mut headers = headers.to_vec();
        let mut start = request.range.map(|start| start as usize);
        match &act {
            Some(Act::Cut(after)) => self.limit = *after,
            Some(Act::WithoutRange) => start = None,
            _ => {}
        }
        let Some(start) = start else { return self.send(200, &headers, contents, true) };
        if start >= contents.len() {
            return self.send(416, &headers, b"", false);
        }
        let range = match act {
            Some(Act::Range(range)) => range,
            _ => format!("bytes {start}-{}/{}", contents.len() - 1, contents.len()),
        };
        headers.push(header("Content-Range", range));
        self.send(206, &headers, &contents[start..], true)
    }

    fn send(
        &mut self,
        code: u16,
        headers: &[(String, String)],
        body: &[u8],
        counted: bool,
    ) -> Option<()> {
        let mut head = format!("HTTP/1.1 {code} Because\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| name == "Content-Length") {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        self.stream.write_all(head.as_bytes()).ok()?;
        self.stream.write_all(b"\r\n").ok()?;
        if !self.body {
            return Some(());
        }
        for piece in body[..body.len().min(self.limit)].chunks(16 << 10) {
            let pause = self.state.lock().ok()?.pause;
            thread::sleep(pause);
            self.stream.write_all(piece).ok()?;
            if counted {
                self.state.lock().ok()?.sent += piece.len() as u64;
            }
        }
        Some(())
    }
}
