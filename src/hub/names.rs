//! Names from outside that become paths and addresses: repositories, revisions and files.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// A repository on the hub, `owner/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoId {
    owner: String,
    name: String,
}

impl RepoId {
    /// Its folder in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }

    /// The repository that a folder of the cache belongs to.
    pub(super) fn of_folder(folder: &str) -> Option<RepoId> {
        let (owner, name) = folder.strip_prefix("models--")?.split_once("--")?;
        format!("{owner}/{name}").parse().ok()
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl FromStr for RepoId {
    type Err = Error;

    /// Takes what the hub allows: letters, digits, `-`, `_` and `.`, none of them where it
    /// could mean something else in a path.
    fn from_str(text: &str) -> Result<RepoId> {
        let usable = |part: &str| {
            (1..=96).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("--")
                && !part.contains("..")
        };
        match text.split_once('/') {
            Some((owner, name)) if usable(owner) && usable(name) => {
                Ok(RepoId { owner: owner.to_owned(), name: name.to_owned() })
            }
            _ => Err(Error::usage(format!("{text:?} is not the name of a repository"))
                .hint("repositories are named OWNER/NAME, as in rain1011/pyramid-flow-sd3")),
        }
    }
}

/// Whether `text` is the full name of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Whether `text` is `length` lower-case hexadecimal digits.
pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Refuses a branch, tag or commit that is none.
pub(super) fn check_revision(revision: &str) -> Result<()> {
    check_relative(revision)
        .map_err(|why| Error::usage(format!("{revision:?} is no revision: {why}")))
}

/// Refuses names of files that could be written anywhere but where they belong.
///
/// # Errors
/// [`crate::ErrorKind::Model`]: a repository with such a file is broken or an attack.
pub(super) fn check_file(name: &str) -> Result<()> {
    let checked = check_relative(name).and_then(|()| {
        let ours = name.split('/').any(|part| part.eq_ignore_ascii_case(super::OWN_FOLDER));
        if ours { Err("that folder is pyraflow's own") } else { Ok(()) }
    });
    checked.map_err(|why| {
        Error::model(format!("the repository has a file named {name:?}: {why}"))
            .hint("nothing was written; do not use this repository")
    })
}

fn check_relative(name: &str) -> Result<(), &'static str> {
    const LONGEST_PART: usize = 255;
    const LONGEST: usize = 1024;
    if name.is_empty() || name.len() > LONGEST {
        return Err("it is empty or too long");
    }
    if name.chars().any(|c| c.is_control() || matches!(c, '\\' | ':')) {
        return Err("it has characters that no such name has");
    }
    if name.starts_with('/') {
        return Err("it is absolute");
    }
    for part in name.split('/') {
        match part {
            "" | "." | ".." => return Err("it leads out of its folder"),
            _ if part.len() > LONGEST_PART => return Err("it is too long"),
            _ => {}
        }
    }
    Ok(())
}

/// A path as part of an address: everything but letters, digits and `-._~/` is escaped.
pub(super) fn encode_path(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded += &format!("%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn repositories() {
        for good in ["rain1011/pyramid-flow-sd3", "a/b", "A.b_c/d-1.0"] {
            let id: RepoId = good.parse().unwrap();
            assert_eq!(id.to_string(), good);
            assert_eq!(RepoId::of_folder(&id.folder()), Some(id));
        }
        let long = format!("a/{}", "b".repeat(97));
        for bad in
            ["", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "-a/b", "a--b/c", "a b/c", &long]
        {
            assert_eq!(bad.parse::<RepoId>().unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
        assert_eq!(RepoId::of_folder("datasets--a--b"), None);
        assert_eq!(RepoId::of_folder("models--a"), None);
    }

    #[test]
    fn files_stay_in_their_folder() {
        for good in ["config.json", "text_encoder_2/model-00001-of-00002.safetensors", "a/..b"] {
            assert!(check_file(good).is_ok(), "{good}");
        }
        let long = "x".repeat(256);
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "./a",
            "a/",
            "a\0b",
            "C:x",
            "a\\b",
            "a\nb",
            ".pyraflow/vae.safetensors",
            "a/.PyraFlow/b",
            &long,
        ] {
            assert_eq!(check_file(bad).unwrap_err().kind(), ErrorKind::Model, "{bad:?}");
        }
        assert!(check_revision("refs/pr/1").is_ok() && check_revision("../main").is_err());
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(encode_path("a b/ü?#%.json"), "a%20b/%C3%BC%3F%23%25.json");
    }
}
