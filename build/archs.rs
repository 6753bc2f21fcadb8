//! The GPU architectures that kernels are compiled for. Shared by the build script, which
//! reads the list, and the program, which chooses among what was built.

use std::fmt;

/// Built if `PYRAFLOW_CUDA_ARCHS` is not set: machine code for every generation from Ampere to
/// consumer Blackwell, and PTX, which the driver compiles, for all others.
pub const DEFAULT: &str = "80,86,89,90a,120,compute_80";

/// What a kernel is compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arch {
    /// Compute capability 8.6 is 86.
    pub number: u32,
    /// With the instructions that only this very capability has: the `a` of `90a`.
    pub accelerated: bool,
    /// PTX instead of machine code.
    pub ptx: bool,
}

impl Arch {
    /// Reads `86`, `90a` or, for PTX, `compute_80`; `sm_86` is the same as `86`.
    pub fn parse(text: &str) -> Result<Arch, String> {
        let (ptx, name) = match text.strip_prefix("compute_") {
            Some(name) => (true, name),
            None => (false, text.strip_prefix("sm_").unwrap_or(text)),
        };
        let (digits, accelerated) =
            name.strip_suffix('a').map_or((name, false), |digits| (digits, true));
        let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
        match digits.parse() {
            Ok(number @ 50..=999) if plain => Ok(Arch { number, accelerated, ptx }),
            _ => Err(format!(
                "{text:?} is no GPU architecture; expected a compute capability such as 86 or \
                 90a, or compute_80 for PTX"
            )),
        }
    }

    /// Reads a list of architectures between commas; `none` is an empty one. The result is
    /// sorted and has no duplicates.
    pub fn parse_list(text: &str) -> Result<Vec<Arch>, String> {
        if text.trim() == "none" {
            return Ok(Vec::new());
        }
        let archs: Result<Vec<Arch>, String> =
            text.split(',').map(|name| Arch::parse(name.trim())).collect();
        let mut archs = archs?;
        archs.sort();
        archs.dedup();
        Ok(archs)
    }

    /// The name without prefix: `86` or `90a`.
    pub fn name(self) -> String {
        format!("{}{}", self.number, if self.accelerated { "a" } else { "" })
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", if self.ptx { "compute" } else { "sm" }, self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, written) in
            [("80", "sm_80"), ("sm_90a", "sm_90a"), ("compute_80", "compute_80"), ("120", "sm_120")]
        {
            assert_eq!(Arch::parse(text).map(|a| a.to_string()), Ok(written.to_string()));
        }
        for text in ["", "a", "8.6", "+86", "086", "9", "90b", "compute_", "sm_", "native", "1000"]
        {
            let error = Arch::parse(text).expect_err(text);
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn lists_are_sorted_and_say_what_is_wrong() {
        let names = |text| -> Result<Vec<String>, String> {
            Ok(Arch::parse_list(text)?.iter().map(Arch::to_string).collect())
        };
        assert_eq!(names("none"), Ok(vec![]));
        assert_eq!(
            names(" 120, 80,sm_80,90a,compute_80,90 "),
            Ok(["sm_80", "compute_80", "sm_90", "sm_90a", "sm_120"].map(String::from).to_vec())
        );
        assert!(names("").is_err() && names("80,").is_err() && names("80 86").is_err());
        assert!(Arch::parse_list(DEFAULT).is_ok_and(|archs| archs.len() == 6));
    }
}
