//! The one error type of the library.
//!
//! An [`Error`] says *what* failed and *where* (the message), *why* (the chain of
//! sources) and, where it is known, *what to do next* (the hint). Its [`ErrorKind`]
//! decides the exit code of the command line, so that scripts can tell a bad prompt
//! from a broken file.

use std::fmt;
use std::path::Path;

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of thing went wrong; each kind has its own exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The command line itself is wrong (exit code 2).
    Usage,
    /// A prompt, an image, a size or another input cannot be used (3).
    Input,
    /// A checkpoint file is missing, damaged or of the wrong model (4).
    Model,
    /// No device, or one that cannot run this (5).
    Device,
    /// Not enough memory for what was asked (6).
    Memory,
    /// Reading or writing a file failed, a full disk included (7).
    Io,
    /// A download failed (8).
    Network,
    /// A computation produced NaN or infinity (9).
    Numeric,
    /// Stopped by the user; finished units are kept (130).
    Interrupted,
}

impl ErrorKind {
    /// The process exit code of this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Usage => 2,
            ErrorKind::Input => 3,
            ErrorKind::Model => 4,
            ErrorKind::Device => 5,
            ErrorKind::Memory => 6,
            ErrorKind::Io => 7,
            ErrorKind::Network => 8,
            ErrorKind::Numeric => 9,
            ErrorKind::Interrupted => 130,
        }
    }
}

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Anything that can go wrong in pyraflow.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Source>,
}

macro_rules! constructors {
    ($($name:ident => $kind:ident),* $(,)?) => {$(
        #[doc = concat!("An error of kind [`ErrorKind::", stringify!($kind), "`].")]
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(ErrorKind::$kind, message)
        }
    )*};
}

impl Error {
    /// An error of the given kind; `message` says what failed and where.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), hint: None, source: None }
    }

    constructors! {
        usage => Usage, input => Input, model => Model, device => Device, memory => Memory,
        numeric => Numeric, interrupted => Interrupted, network => Network,
    }

    /// A failed file operation: `action` is a verb phrase such as "cannot read".
    pub fn io(action: &str, path: &Path, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("{action} {}", path.display())).because(source)
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error as another kind (a missing file is [`ErrorKind::Model`] when it
    /// belongs to a checkpoint).
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Puts a phrase that says where in front of the message.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// What sort of error this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What to do next, where it is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}
