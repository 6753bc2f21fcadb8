//! Graphs that make the latent a stage starts from: [`Entry`] on the device.

use crate::Result;
use crate::exec::{GraphId, Session};
use crate::graph::{Graph, Op, TensorId};
use crate::sampler::{CHANNELS, Entry, LatentShape, Noise};
use crate::tensor::DType;

/// What of an entry its graph depends on: not the noise itself, so that the graphs of one unit
/// serve all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Recipe {
    /// Of the noise.
    shape: LatentShape,
    /// Whether the device makes the noise, and if so, whether it is block noise.
    seeded: Option<bool>,
    /// Factors on the latent of the stage below and on the noise.
    renoise: Option<[f32; 2]>,
}

impl Recipe {
    fn of(entry: &Entry) -> Recipe {
        Recipe {
            shape: entry.noise().shape(),
            seeded: match entry.noise() {
                Noise::Values(_) => None,
                Noise::Seeded(draw) => Some(draw.block),
            },
            renoise: match *entry {
                Entry::Start { .. } => None,
                Entry::Renoise { alpha, beta, .. } => Some([alpha, beta]),
            },
        }
    }

    /// Records the graph: inputs `words` or `noise`, and `below` where there is a stage below;
    /// output `x`.
    fn record(&self) -> Result<Graph> {
        let LatentShape { frames, height, width } = self.shape;
        let mut g = Graph::new();
        g.scope("noise");
        let noise = match self.seeded {
            Some(block) => {
                let words = g.input("words", &[4], DType::U32);
                let op = Op::NormalNoise { frames, height, width, block };
                g.push_as(op, &[words], DType::F32)?
            }
            None => g.input("noise", &[frames, height, width, CHANNELS], DType::F32),
        };
        g.scope("stage entry");
        let x = match self.renoise {
            Some([alpha, beta]) => {
                let shape = [frames, height / 2, width / 2, CHANNELS];
                let below = g.input("below", &shape, DType::F32);
                g.push(Op::DoubleRenoise { alpha, beta }, &[below, noise])?
            }
            None => (1..=Entry::HALVINGS).try_fold(noise, |x, halving| {
                let last = halving == Entry::HALVINGS;
                let factor = if last { Entry::START_FACTOR } else { 1.0 };
                g.push(Op::HalveBilinear { factor }, &[x])
            })?,
        };
        g.mark_output("x", x);
        Ok(g)
    }
}

/// The entrances of a session, each recorded when it is first needed.
#[derive(Default)]
pub(super) struct Entrances {
    known: Vec<(Recipe, GraphId)>,
}

impl Entrances {
    /// Writes the noise of `entry` to its graph, which is returned; it is still to be run.
    /// `below` is the latent that the stage below ended with.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when `below` is needed and missing or of another size, and
    /// those of the backend.
    pub fn prepare(
        &mut self,
        session: &mut dyn Session,
        entry: &Entry,
        below: Option<(GraphId, TensorId)>,
    ) -> Result<GraphId> {
        let recipe = Recipe::of(entry);
        let known = self.known.iter().find(|(known, _)| *known == recipe);
        let graph = match known {
            Some((_, graph)) => *graph,
            None => {
                let graph = session.add(recipe.record()?)?;
                self.known.push((recipe, graph));
                graph
            }
        };
        match entry.noise() {
            Noise::Values(latent) => {
                let input = session.find(graph, "noise")?;
                session.write(graph, input, latent.data())?;
            }
            Noise::Seeded(draw) => {
                let input = session.find(graph, "words")?;
                session.write_ids(graph, input, &draw.words())?;
            }
        }
        if recipe.renoise.is_some() {
            let from = below.ok_or_else(Entry::nothing_below)?;
            session.copy(from, 0, (graph, session.find(graph, "below")?))?;
        }
        Ok(graph)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Error;
    use crate::exec::{Backend, Cpu};
    use crate::sampler::{Latent, NoiseSource, PhiloxNoise, stage_spans};
    use crate::tensor::{WeightSource, WeightView};

    struct NoWeights;

    impl WeightSource for NoWeights {
        fn weight(&self, name: &str) -> Result<WeightView<'_>> {
            Err(Error::model(format!("there is no weight {name}")))
        }
    }

    /// A graph that holds a latent, as that of a stage's step does.
    fn holder(session: &mut dyn Session, latent: &Latent) -> (GraphId, TensorId) {
        let LatentShape { frames, height, width } = latent.shape();
        let mut g = Graph::new();
        g.input("current", &[frames, height, width, CHANNELS], DType::F32);
        let graph = session.add(g).expect("plan");
        let input = session.find(graph, "current").expect("input");
        session.write(graph, input, latent.data()).expect("write");
        (graph, input)
    }

    /// The entries of two units, with the noise itself if `recorded`.
    fn entries(recorded: bool) -> Vec<Entry> {
        let mut source = PhiloxNoise { seed: 0xfedc_ba98_7654_3210 };
        let kept = |noise: Noise| if recorded { Noise::Values(noise.into_latent()) } else { noise };
        let mut entries = Vec::new();
        for unit in 0..2 {
            let noise = source.initial(unit, LatentShape::frame(16, 24)).expect("noise");
            entries.push(Entry::Start { noise: kept(noise) });
            for (stage, shape) in [(1, LatentShape::frame(8, 12)), (2, LatentShape::frame(16, 24))]
            {
                let (alpha, beta) = stage_spans()[stage].renoise();
                let noise = kept(source.block(unit, stage, shape).expect("noise"));
                entries.push(Entry::Renoise { alpha: alpha as f32, beta: beta as f32, noise });
            }
        }
        entries
    }

    #[test]
    fn latents_have_the_bits_of_the_host_s() {
        for recorded in [false, true] {
            let mut session = Cpu::new().open(Arc::new(NoWeights)).expect("session");
            let mut entrances = Entrances::default();
            let mut below: Option<Latent> = None;
            for entry in entries(recorded) {
                let held = below.as_ref().map(|latent| holder(&mut *session, latent));
                let graph = entrances.prepare(&mut *session, &entry, held).expect("graph");
                session.run(graph).expect("run");
                let x = session.find(graph, "x").expect("output");
                let found = session.read(graph, x).expect("latent");
                let expected = entry.latent(below.as_ref()).expect("latent");
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(expected.data()), "{:?}", Recipe::of(&entry));
                below = Some(expected);
            }
            assert_eq!(entrances.known.len(), 3, "each is recorded once");
        }
    }

    #[test]
    fn what_was_left_below_must_fit() {
        let mut session = Cpu::new().open(Arc::new(NoWeights)).expect("session");
        let entry = entries(false).swap_remove(1);
        let small = holder(&mut *session, &Latent::zeros(LatentShape::frame(2, 3)));
        for below in [None, Some(small)] {
            let refused = Entrances::default().prepare(&mut *session, &entry, below);
            assert_eq!(refused.expect_err("refused").kind(), crate::ErrorKind::Usage);
        }
    }
}
