//! Many videos from one file of prompts.
//!
//! * [`read_lines`] reads a file of prompts, plain or JSON, line by line.
//! * [`jobs`] makes of every line a [`Job`] with a seed, a key and a name for its output, none
//!   of which depend on the other lines, on the machine or on when the file is run.
//! * [`Records`] remembers in a file of JSON lines what became of each.
//! * [`run`] does what is still to be done of one [`Shard`], and can be stopped and run again at
//!   any time: nothing is lost and nothing made twice.

mod jobs;
mod lines;
mod records;
mod run;

pub use jobs::{Entry, Job, Naming, jobs};
pub use lines::{Form, Line, LineSettings, OneOrThree, read_lines};
pub use records::{Record, Records, Status};
pub use run::{Maker, Options, Shard, Summary, Told, run};
