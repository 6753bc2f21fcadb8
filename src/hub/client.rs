//! One request to the hub: redirects, the token's reach, and what every answer means.

use std::time::Duration;

use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::names::RepoId;
use super::settings::Settings;
use crate::{Error, Result};

/// Longest wait for a connection, for an answer and between two reads of a body.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most redirects followed.
const MAX_REDIRECTS: usize = 10;
/// Longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// It cannot.
    No,
    /// It can, after the usual pause.
    Soon,
    /// The server says when.
    After(Duration),
}

/// A request that failed.
#[derive(Debug)]
pub(super) struct Fault {
    pub error: Error,
    pub retry: Retry,
    /// The status of the answer, where that is what was wrong.
    pub status: Option<u16>,
}

impl Fault {
    pub fn fatal(error: Error) -> Fault {
        Fault { error, retry: Retry::No, status: None }
    }

    pub fn passing(error: Error) -> Fault {
        Fault { error, retry: Retry::Soon, status: None }
    }
}

/// What the hub says about a file before it redirects to where the file is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Linked {
    pub etag: Option<String>,
    pub size: Option<u64>,
}

impl Linked {
    fn add(&mut self, headers: &HeaderMap) {
        self.etag = self.etag.take().or_else(|| text(headers, "x-linked-etag").map(clean_etag));
        self.size = self.size.or_else(|| text(headers, "x-linked-size")?.parse().ok());
    }
}

/// An answer with status 200 or 206, or a redirect that tells enough.
pub(super) struct Reply {
    pub response: Response<Body>,
    pub linked: Linked,
    /// Where it came from, for messages: without what follows a `?`, which may be a key.
    pub place: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        text(self.response.headers(), name)
    }
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The headers that describe a file.
    About,
    /// The contents from this byte on.
    From(u64),
}

/// A client of one hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings) -> Client<'a> {
        let agent = Agent::config_builder()
            .user_agent(concat!("pyraflow/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // Followed here, so that the token stays with the hub.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(PATIENCE))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .timeout_per_write(Some(PATIENCE))
            .build()
            .into();
        Client { agent, settings }
    }

    pub fn endpoint(&self) -> &str {
        &self.settings.endpoint
    }

    /// Asks for `path` (escaped, beginning with `/`) of the hub. `repo` is for messages. A
    /// redirect that tells `enough` is returned instead of being followed.
    pub fn send(
        &self,
        path: &str,
        repo: &RepoId,
        ask: Ask,
        enough: &dyn Fn(&Linked) -> bool,
    ) -> Result<Reply, Fault> {
        let endpoint = self.endpoint();
        let home = origin(endpoint).ok_or_else(|| {
            Fault::fatal(Error::usage(format!("HF_ENDPOINT is {endpoint:?}, no web address")))
        })?;
        let mut url = format!("{endpoint}{path}");
        let mut visited: Vec<String> = Vec::new();
        let mut linked = Linked::default();
        loop {
            let place = without_query(&url).to_owned();
            let at_home = origin(&url).as_ref() == Some(&home);
            let response = self.once(&url, at_home, ask).map_err(|e| connection(&place, e))?;
            linked.add(response.headers());
            let status = response.status();
            if !status.is_redirection() {
                let reply = Reply { response, linked, place };
                return self.accept(reply, repo, at_home);
            }
            if enough(&linked) {
                return Ok(Reply { response, linked, place });
            }
            let location = text(response.headers(), "location").map(str::to_owned);
            visited.push(std::mem::take(&mut url));
            url = self.next(&visited, location.as_deref(), &place)?;
        }
    }

    fn once(&self, url: &str, at_home: bool, ask: Ask) -> Result<Response<Body>, ureq::Error> {
        let request = match ask {
            Ask::About => self.agent.head(url),
            Ask::From(_) => self.agent.get(url),
        };
        // Lengths and ranges are those of the file, not of a compressed form of it.
        let mut request = request.header("Accept-Encoding", "identity");
        if let Ask::From(start @ 1..) = ask {
            request = request.header("Range", format!("bytes={start}-"));
        }
        if let Some(token) = self.settings.token.as_ref().filter(|_| at_home) {
            request = request.header("Authorization", token.header());
        }
        request.call()
    }

    /// Where a redirect leads.
    fn next(
        &self,
        visited: &[String],
        location: Option<&str>,
        place: &str,
    ) -> Result<String, Fault> {
        let refused = |why: &str| {
            let error = Error::network(format!("{place} redirects {why}"));
            Fault::fatal(error.hint("check HF_ENDPOINT and the proxy settings, then pull again"))
        };
        let here = visited.last().map(String::as_str).unwrap_or_default();
        let url = location
            .and_then(|location| join(here, location))
            .ok_or_else(|| refused("to no usable address"))?;
        if visited.contains(&url) {
            return Err(refused("in a circle"));
        }
        if visited.len() > MAX_REDIRECTS {
            return Err(refused(&format!("more than {MAX_REDIRECTS} times")));
        }
        if here.starts_with("https:") && !url.starts_with("https:") {
            return Err(refused("to an address that is not encrypted"));
        }
        Ok(url)
    }

    fn accept(&self, reply: Reply, repo: &RepoId, at_home: bool) -> Result<Reply, Fault> {
        let headers = reply.response.headers();
        let Reply { place, .. } = &reply;
        match reply.response.status().as_u16() {
            200 | 206 => {
                let html = text(headers, "content-type")
                    .is_some_and(|kind| kind.trim_start().starts_with("text/html"));
                if !html {
                    return Ok(reply);
                }
                let error = Error::network(format!("{place} answers with a web page, not a file"));
                Err(Fault::fatal(error.hint(
                    "a login page of the network or a proxy may be in the way, or HF_ENDPOINT is \
                     not a hub; open the address in a browser, then pull again",
                )))
            }
            // A signed address of the file may have run out; the hub gives a new one.
            401 | 403 | 404 if !at_home => {
                let error = Error::network(format!("{place} refuses the download"));
                Err(Fault::passing(error.hint("pull again")))
            }
            code @ (401 | 403) => Err(Fault::fatal(self.denied(code, headers, repo))),
            404 if at_home => Err(Fault::fatal(not_found(place, headers, repo))),
            code => Err(busy_or_broken(code, headers, place)),
        }
    }

    /// Not allowed. The hub says 401 of repositories that do not exist, too.
    fn denied(&self, code: u16, headers: &HeaderMap, repo: &RepoId) -> Error {
        let endpoint = self.endpoint();
        let gated = text(headers, "x-error-code") == Some("GatedRepo");
        let error = Error::network(format!(
            "the hub does not let you read {repo} (status {code}){}",
            detail(headers)
        ));
        match (&self.settings.token, gated) {
            (None, true) => error.hint(format!(
                "its licence must be accepted: log in and accept it at {endpoint}/{repo}, then \
                 set HF_TOKEN to a token of your account"
            )),
            (Some(_), true) => error.hint(format!(
                "accept its licence at {endpoint}/{repo} with the account of your token"
            )),
            (None, false) => error.hint(
                "check the name; for a private repository set HF_TOKEN to a token of your account",
            ),
            (Some(_), false) => error.hint(
                "check the name; your token (HF_TOKEN, or the token file) may be wrong, expired \
                 or without access",
            ),
        }
    }
}

fn not_found(place: &str, headers: &HeaderMap, repo: &RepoId) -> Error {
    let what = match text(headers, "x-error-code") {
        Some("EntryNotFound") => format!("{repo} has no such file: {place}"),
        Some("RevisionNotFound") => format!("{repo} has no such revision: {place}"),
        _ => format!("there is no {repo} on the hub: {place}"),
    };
    Error::network(format!("{what} (status 404){}", detail(headers)))
        .hint("check the name, and HF_ENDPOINT if you set it")
}

fn busy_or_broken(code: u16, headers: &HeaderMap, place: &str) -> Fault {
    let error = Error::network(format!("{place} answers with status {code}{}", detail(headers)));
    let pause = text(headers, "retry-after")
        .and_then(|seconds| seconds.trim().parse().ok())
        .map(Duration::from_secs);
    match (code, pause) {
        (429 | 500..=599, Some(pause)) if pause > LONGEST_PAUSE => {
            let seconds = pause.as_secs();
            Fault::fatal(error.hint(format!(
                "the server asks to wait {seconds} seconds: pull again then; what is there is kept"
            )))
        }
        (429 | 500..=599, pause) => Fault {
            error: error
                .hint("the server is busy or broken: pull again later; what is there is kept"),
            retry: pause.map_or(Retry::Soon, Retry::After),
            status: Some(code),
        },
        (408, _) => Fault::passing(error.hint("pull again; what is there is kept")),
        _ => {
            let error = error.hint("check HF_ENDPOINT and the proxy settings, then pull again");
            Fault { status: Some(code), ..Fault::fatal(error) }
        }
    }
}

/// A request without an answer.
pub(super) fn connection(place: &str, cause: ureq::Error) -> Fault {
    use ureq::Error as E;
    let hint = "check the connection (and HF_ENDPOINT and the proxy settings, if you set them), \
                then pull again; what is there is kept";
    let passing = matches!(
        cause,
        E::Io(_) | E::Timeout(_) | E::HostNotFound | E::ConnectionFailed | E::Protocol(_)
    );
    let error = Error::network(format!("cannot read from {place}")).because(cause).hint(hint);
    if passing { Fault::passing(error) } else { Fault::fatal(error) }
}

/// What the hub says about an error, made fit for a terminal.
fn detail(headers: &HeaderMap) -> String {
    const LONGEST: usize = 200;
    let message = text(headers, "x-error-message").unwrap_or_default();
    let shown: String = message.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
    if shown.is_empty() { shown } else { format!(": {shown}") }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// An entity tag without quotes and without the mark of weakness.
pub(super) fn clean_etag(etag: &str) -> String {
    etag.trim().trim_start_matches("W/").trim_matches('"').to_owned()
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let standard = if scheme == "https" { 443 } else { 80 };
    let authority = uri.authority()?;
    let port = authority.port_u16().unwrap_or(standard);
    Some((scheme, authority.host().to_ascii_lowercase(), port))
}

fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

/// The address that `location` means in an answer from `base`; none if it is no web address.
fn join(base: &str, location: &str) -> Option<String> {
    let location = location.split('#').next()?;
    let scheme = &base[..base.find("://")?];
    let lower = location.to_ascii_lowercase();
    let absolute = if lower.starts_with("http://") || lower.starts_with("https://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else {
        let base = without_query(base);
        let path = base[scheme.len() + 3..].find('/').map(|at| at + scheme.len() + 3);
        let root = &base[..path.unwrap_or(base.len())];
        match location {
            "" => return None,
            _ if location.starts_with('/') => format!("{root}{location}"),
            // A colon before any slash begins an address of another kind.
            _ if location.split(['/', '?']).next()?.contains(':') => return None,
            _ => {
                let folder = base.rfind('/').filter(|&at| at >= root.len());
                format!("{}/{location}", &base[..folder.unwrap_or(root.len())])
            }
        }
    };
    let uri: Uri = absolute.parse().ok()?;
    // A name and password in an address would be sent there.
    let plain = uri.authority().is_some_and(|a| !a.as_str().contains('@') && !a.host().is_empty());
    plain.then_some(absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say() {
        let base = "http://hub:1/a/b?c=d/e";
        let cases = [
            ("https://cdn/x?sig=1", Some("https://cdn/x?sig=1")),
            ("//cdn/x", Some("http://cdn/x")),
            ("/x", Some("http://hub:1/x")),
            ("x", Some("http://hub:1/a/x")),
            ("x#y", Some("http://hub:1/a/x")),
            ("ftp://cdn/x", None),
            ("javascript:alert(1)", None),
            ("http://user:password@cdn/x", None),
            ("http:///x", None),
            ("", None),
        ];
        for (location, expected) in cases {
            assert_eq!(join(base, location).as_deref(), expected, "{location}");
        }
        assert_eq!(join("http://hub", "x").as_deref(), Some("http://hub/x"));
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin("https://Hub/a"), origin("https://hub:443"));
        assert_ne!(origin("https://hub/a"), origin("http://hub/a"));
        assert_ne!(origin("http://hub:1"), origin("http://hub:2"));
        assert_ne!(origin("http://hub.evil"), origin("http://hub"));
    }

    #[test]
    fn entity_tags() {
        for etag in ["abc", "\"abc\"", "W/\"abc\"", " \"abc\" "] {
            assert_eq!(clean_etag(etag), "abc");
        }
    }
}
