//! Whether there is room for a run, found out before anything is loaded.

use super::{Event, Networks, Output, PhasePlan, Pipeline, Reporter, Request, plan};
use crate::exec::{Backend, ImaginedGpu, PROCESS_BYTES};
use crate::{Error, Result};

impl Pipeline {
    /// Refuses what cannot fit into the memory of device and host with the scratch file, and
    /// what cannot be decoded early.
    pub(super) fn check_memory(
        &self,
        request: &Request,
        output: &Output,
        reporter: &mut dyn Reporter,
    ) -> Result<()> {
        if output.early && request.tiling.is_some() {
            return Err(Error::usage("tiles are decoded when all units are there")
                .hint("leave out --tile, or what shows frames while they are made"));
        }
        let (networks, backend) = (Networks::of(self.checkpoint())?, self.backend());
        let phases = plan(&networks, request, backend, None)?;
        let need = |p: &PhasePlan| match backend.copies_weights() {
            true => p.device_bytes,
            false => p.memory_bytes(),
        };
        let of = |phases: &[PhasePlan], name: &str| {
            phases.iter().find(|p| p.name == name).map_or(0, need)
        };
        // What is decoded early makes do with what is left beside the transformer.
        let sampling = of(&phases, "sampling");
        let early = match backend.free_memory().filter(|_| output.early) {
            Some(available) if backend.copies_weights() => {
                let memory = available.saturating_sub(sampling);
                let left = ImaginedGpu { memory, host: backend.host_memory() };
                Some(plan(&networks, request, &left, None)?)
            }
            _ => None,
        };
        let decoding = early.as_ref().unwrap_or(&phases);
        fits_host(decoding, backend)?;
        let Some(available) = backend.free_memory() else { return Ok(()) };
        let mut all: Vec<(&str, u64)> = phases.iter().map(|p| (&*p.name, need(p))).collect();
        if output.early {
            all.push(("sampling with decoding", sampling + of(decoding, "decoding")));
        }
        if let Some((name, need)) = all.into_iter().max_by_key(|&(_, need)| need)
            && need > available
        {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            return Err(Error::memory(format!(
                "{name} needs {:.2} GiB at least, {:.2} GiB can be had",
                gib(need),
                gib(available)
            ))
            .hint("make the video smaller or shorter; `pyraflow plan` shows what it takes"));
        }
        warn_of_file(decoding, reporter);
        Ok(())
    }
}

/// As [`require_host`], for the phases that need most.
fn fits_host(phases: &[PhasePlan], backend: &dyn Backend) -> Result<()> {
    let require = |p: &PhasePlan| require_host(&p.name, p.pinned_bytes, p.scratch_bytes, backend);
    let most_pinned = phases.iter().max_by_key(|phase| phase.pinned_bytes);
    let most_in_file = phases.iter().max_by_key(|phase| phase.scratch_bytes);
    most_pinned.into_iter().chain(most_in_file).try_for_each(require)
}

/// Refuses what needs more page-locked memory than the host has left, though all that can is in
/// the scratch file, and a scratch file that there is no room for.
pub(super) fn require_host(
    phase: &str,
    pinned: u64,
    scratch: u64,
    backend: &dyn Backend,
) -> Result<()> {
    if let Some(available) = backend.host_memory()
        && pinned > available
    {
        let gib = |bytes: u64| (bytes + PROCESS_BYTES) as f64 / f64::from(1 << 30);
        let error = Error::memory(format!(
            "{phase} needs {:.2} GiB of host memory, for itself and for what does not stay on the \
             GPU, {:.2} GiB can be had",
            gib(pinned),
            gib(available)
        ));
        return Err(error.hint(format!(
            "close other programs, or if --max-host is given, allow {:.2}G at least",
            (gib(pinned) * 100.0).ceil() / 100.0
        )));
    }
    if scratch > 0 { backend.check_scratch(scratch).map_err(|e| e.at(phase)) } else { Ok(()) }
}

/// Says that carried frames wait in the scratch file, if they do.
fn warn_of_file(phases: &[PhasePlan], reporter: &mut dyn Reporter) {
    let bytes = phases.iter().map(|phase| phase.scratch_bytes).max().unwrap_or(0);
    if bytes > 0 {
        let message = format!(
            "neither GPU nor host has memory for {:.1} GiB of decoded frames; they wait in a \
             scratch file (--scratch says where), which may be slow: more --max-host or \
             --max-vram makes it smaller",
            bytes as f64 / f64::from(1 << 30)
        );
        reporter.event(&Event::Warning { message });
    }
}

#[cfg(test)]
mod tests {
    use super::fits_host;
    use crate::ErrorKind;
    use crate::exec::ImaginedGpu;
    use crate::pipeline::PhasePlan;

    #[test]
    fn what_is_locked_on_the_host_must_be_there() {
        let phase = |name: &str, pinned_bytes| PhasePlan {
            name: name.into(),
            pinned_bytes,
            ..PhasePlan::default()
        };
        let phases = [phase("text", 64 << 20), phase("decoding", 6 << 30)];
        let with = |host| fits_host(&phases, &ImaginedGpu { memory: 1 << 30, host });
        with(Some(6 << 30)).expect("just enough");
        with(None).expect("as much as is needed");
        let error = with(Some(5 << 30)).expect_err("too little");
        assert_eq!(error.kind(), ErrorKind::Memory);
        assert!(error.to_string().starts_with("decoding needs 6.75 GiB"), "{error}");
    }
}
