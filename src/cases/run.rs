//! Running a case on a backend.

use super::Case;
use crate::exec::{Backend, GraphId, Session};
use crate::{Error, Result};

impl Case {
    /// Puts the case on a backend.
    ///
    /// # Errors
    /// When the backend refuses a graph.
    pub fn open(&self, backend: &dyn Backend) -> Result<Running> {
        let mut session = backend.open(self.weights()?)?;
        let recorded = self.record(backend.activations())?;
        let mut outputs = Vec::new();
        for (number, graph) in recorded.iter().enumerate() {
            for &name in &self.outputs {
                let shape = graph.tensor(graph.find(name)?).shape.clone();
                outputs.push((number, name, shape));
            }
        }
        let graphs = recorded.into_iter().map(|g| session.add(g)).collect::<Result<Vec<_>>>()?;
        Ok(Running { session, graphs, inputs: self.inputs()?, outputs })
    }
}

/// An input of a graph.
#[derive(Debug, Clone)]
pub struct Input {
    /// The name it is found by.
    pub name: String,
    /// What is written.
    pub data: Data,
}

/// The contents of an input.
#[derive(Debug, Clone)]
pub enum Data {
    /// Numbers.
    Values(Vec<f32>),
    /// Ids.
    Ids(Vec<u32>),
}

/// A case on a backend.
pub struct Running {
    session: Box<dyn Session>,
    graphs: Vec<GraphId>,
    inputs: Vec<Vec<Input>>,
    /// Number of the graph, name and shape.
    outputs: Vec<(usize, &'static str, Vec<usize>)>,
}

/// One compared tensor.
#[derive(Debug, Clone)]
pub struct Output {
    /// Name of the tensor, with the number of the graph where there are several: `y`, `y 1`.
    pub name: String,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<f32>,
}

impl Running {
    fn write(&mut self) -> Result<()> {
        for (&graph, inputs) in self.graphs.iter().zip(&self.inputs) {
            for input in inputs {
                let id = self.session.find(graph, &input.name)?;
                match &input.data {
                    Data::Values(values) => self.session.write(graph, id, values)?,
                    Data::Ids(ids) => self.session.write_ids(graph, id, ids)?,
                }
            }
        }
        Ok(())
    }

    /// Writes the inputs, runs the graphs in order and reads all outputs.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn run(&mut self) -> Result<Vec<Output>> {
        self.write()?;
        let mut outputs = Vec::new();
        for (number, &graph) in self.graphs.iter().enumerate() {
            self.session.run(graph)?;
            for (_, name, shape) in self.outputs.iter().filter(|(of, ..)| *of == number) {
                let id = self.session.find(graph, name)?;
                let values = self.session.read(graph, id)?;
                let name = match self.graphs.len() {
                    1 => (*name).to_string(),
                    _ => format!("{name} {number}"),
                };
                outputs.push(Output { name, shape: shape.clone(), values });
            }
        }
        Ok(outputs)
    }

    /// Names of the program's kernels that a run of all graphs starts, in order, where the backend
    /// has such.
    ///
    /// # Errors
    /// As for [`Session::kernels`].
    pub fn kernels(&self) -> Result<Vec<&'static str>> {
        let of = |&graph: &GraphId| self.session.kernels(graph);
        Ok(self.graphs.iter().map(of).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Seconds of each of `repeats` runs of all graphs, after one run to warm up.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn time(&mut self, repeats: usize) -> Result<Vec<f64>> {
        self.write()?;
        for &graph in &self.graphs {
            self.session.run(graph)?;
        }
        let mut total = vec![0.0; repeats];
        for &graph in &self.graphs {
            let times = self.session.time(graph, repeats)?;
            if times.len() != repeats {
                return Err(Error::device("the backend did not time every run"));
            }
            total.iter_mut().zip(times).for_each(|(sum, seconds)| *sum += seconds);
        }
        Ok(total)
    }
}
