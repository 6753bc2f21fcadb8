//! Where models come from and where they are kept: the variables of Hugging Face's tools.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use crate::{Error, ErrorKind, Result};

/// The public hub.
pub const PUBLIC_ENDPOINT: &str = "https://huggingface.co";

/// Server, folder and token.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The server's address without a `/` at its end: `HF_ENDPOINT`, or the public hub.
    pub endpoint: String,
    /// The cache: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` in
    /// `XDG_CACHE_HOME` or `~/.cache`.
    pub cache: PathBuf,
    /// `HF_TOKEN`, else what is in the file `HF_TOKEN_PATH` or `token` in `HF_HOME`. It is
    /// sent to the endpoint and to no other host.
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE`: nothing may be asked of the network.
    pub offline: bool,
}

/// A secret that shows itself nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token as it is sent.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if it holds what cannot be sent in a header; the message does
    /// not repeat it.
    pub fn new(text: &str) -> Result<Token> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::usage("the Hugging Face token is not a token")
                .hint("set HF_TOKEN to one from your account's settings, or unset it"));
        }
        Ok(Token(text.to_owned()))
    }

    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Settings {
    /// The settings of this process.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a variable that makes no sense; [`ErrorKind::Io`] where
    /// there is no home folder, or a token file that cannot be read.
    pub fn from_env() -> Result<Settings> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Result<Settings> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let home = path("HF_HOME").or_else(|| {
            let absolute = |name| path(name).filter(|p| p.is_absolute());
            let cache =
                absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
            Some(cache?.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| {
                Error::new(ErrorKind::Io, "there is no home folder to keep models in")
                    .hint("set HF_HUB_CACHE to a folder")
            })?;
        let text = |name: &str| -> Result<Option<String>> {
            get(name)
                .map(|value| value.into_string())
                .transpose()
                .map_err(|_| Error::usage(format!("{name} is not valid UTF-8")))
        };
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| PUBLIC_ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(Error::usage(format!("HF_ENDPOINT is {endpoint:?}, no web address"))
                .hint("it begins with https:// or http://; unset it for the public hub"));
        }
        let token = match text("HF_TOKEN")? {
            Some(token) => Some(Token::new(&token)?),
            None => {
                let file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")));
                file.map_or(Ok(None), |file| token_in(&file))?
            }
        };
        let offline = text("HF_HUB_OFFLINE")?
            .is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
        // Links and messages should hold whatever folder the program runs in.
        let cache = std::path::absolute(&cache).map_err(|e| Error::io("cannot use", &cache, e))?;
        Ok(Settings { endpoint, cache, token, offline })
    }
}

/// The token in a file; none if there is no such file or nothing in it.
fn token_in(file: &std::path::Path) -> Result<Option<Token>> {
    match std::fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Token::new(&text).map(Some).map_err(|e| e.at(file.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("cannot read the token in", file, e)
            .hint("make it readable, or set HF_TOKEN")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value))
        };
        Settings::from_variables(get)
    }

    #[test]
    fn variables_decide_as_in_the_published_tools() {
        let cache = |variables: &[(&str, &str)]| settings(variables).map(|s| s.cache).ok();
        assert_eq!(cache(&[("HOME", "/h")]), Some("/h/.cache/huggingface/hub".into()));
        let xdg = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(cache(&xdg), Some("/x/huggingface/hub".into()));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Some("/f/hub".into()));
        let all = [("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/o"), ("HF_HUB_CACHE", "/c")];
        assert_eq!(cache(&all), Some("/c".into()));
        assert_eq!(cache(&all[..2]), Some("/o".into()));
        assert_eq!(settings(&[]).map(|_| ()).unwrap_err().kind(), ErrorKind::Io);

        let plain = settings(&[("HOME", "/h")]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline), (PUBLIC_ENDPOINT, false));
        let mirror = [("HOME", "/h"), ("HF_ENDPOINT", "http://m:80/"), ("HF_HUB_OFFLINE", "1")];
        let mirror = settings(&mirror).unwrap();
        assert_eq!((mirror.endpoint.as_str(), mirror.offline), ("http://m:80", true));
        let ftp = settings(&[("HOME", "/h"), ("HF_ENDPOINT", "ftp://m")]).unwrap_err();
        assert_eq!(ftp.kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_token_is_found_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| settings(variables).unwrap().token;
        assert_eq!(token(&[("HF_HOME", home)]), None);
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[("HF_HOME", home)]), Token::new("hf_file").ok());
        let both = [("HF_HOME", home), ("HF_TOKEN", "hf_variable")];
        assert_eq!(token(&both), Token::new("hf_variable").ok());
        std::fs::write(folder.path().join("other"), "hf_other").unwrap();
        let other = folder.path().join("other");
        let other = [("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap())];
        assert_eq!(token(&other), Token::new("hf_other").ok());

        let shown = format!("{:?}", settings(&both).unwrap());
        assert!(!shown.contains("hf_variable"), "{shown}");
        let bad = Token::new("hf_secret\nX-Header: 1").unwrap_err();
        assert!(!bad.to_string().contains("secret"), "{bad}");
    }
}
