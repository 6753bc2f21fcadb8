//! Recording: how models add tensors, views, weights and nodes to a graph.

use std::ops::Range;

use super::{Block, ConvSpec, Graph, Node, Op, Role, Tensor, TensorId, Weight, WeightId, shape};
use crate::tensor::DType;
use crate::{Error, Result};

impl Graph {
    fn add(&mut self, name: &str, shape: &[usize], dtype: DType, role: Role) -> TensorId {
        let id = TensorId(self.tensors.len() as u32);
        if matches!(role, Role::Input | Role::State) {
            self.named.insert(name.to_string(), id);
        }
        self.tensors.push(Tensor {
            name: name.to_string(),
            shape: shape.to_vec(),
            dtype,
            root: id,
            offset: 0,
            row_stride: shape.last().copied().unwrap_or(1),
            role,
        });
        id
    }

    /// A tensor the caller writes before a run and which keeps its contents.
    pub fn input(&mut self, name: &str, shape: &[usize], dtype: DType) -> TensorId {
        self.add(name, shape, dtype, Role::Input)
    }

    /// A tensor that nodes write and that keeps its contents, shared with the other graphs of
    /// a session that have one of this name and size.
    pub fn state(&mut self, name: &str, shape: &[usize], dtype: DType) -> TensorId {
        self.add(name, shape, dtype, Role::State)
    }

    /// A tensor whose f32 contents are known now.
    ///
    /// # Panics
    /// If `data` does not have the number of elements `shape` says.
    pub fn constant(&mut self, name: &str, shape: &[usize], data: Vec<f32>) -> TensorId {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "constant {name}");
        self.constants.push(data);
        let role = Role::Constant(self.constants.len() - 1);
        self.add(name, shape, DType::F32, role)
    }

    /// A place for `shape` elements in the arena, written by later nodes.
    pub fn empty(&mut self, shape: &[usize], dtype: DType) -> TensorId {
        let name = format!("{}#{}", self.scope, self.tensors.len());
        self.add(&name, shape, dtype, Role::Intermediate)
    }

    /// Keeps `tensor` until the end of the run, to be read by `name`.
    pub fn mark_output(&mut self, name: &str, tensor: TensorId) {
        let root = self.tensor(tensor).root;
        if self.tensors[root.index()].role == Role::Intermediate {
            self.tensors[root.index()].role = Role::Output;
        }
        self.named.insert(name.to_string(), tensor);
    }

    fn view(
        &mut self,
        of: TensorId,
        shape: Vec<usize>,
        skip: usize,
        row_stride: usize,
    ) -> TensorId {
        let parent = self.tensor(of);
        let view = Tensor {
            name: parent.name.clone(),
            shape,
            dtype: parent.dtype,
            root: parent.root,
            offset: parent.offset + skip,
            row_stride,
            role: Role::Intermediate,
        };
        self.tensors.push(view);
        TensorId(self.tensors.len() as u32 - 1)
    }

    /// Rows `range` of a token tensor.
    ///
    /// # Panics
    /// If the range does not lie within the tensor.
    pub fn rows(&mut self, of: TensorId, range: Range<usize>) -> TensorId {
        let t = self.tensor(of);
        assert!(t.shape.len() == 2 && range.end <= t.shape[0], "rows {range:?} of {:?}", t.shape);
        let (stride, cols) = (t.row_stride, t.shape[1]);
        self.view(of, vec![range.len(), cols], range.start * stride, stride)
    }

    /// Columns `range` of a token tensor.
    ///
    /// # Panics
    /// If the range does not lie within the tensor.
    pub fn cols(&mut self, of: TensorId, range: Range<usize>) -> TensorId {
        let t = self.tensor(of);
        assert!(t.shape.len() == 2 && range.end <= t.shape[1], "cols {range:?} of {:?}", t.shape);
        let (stride, rows) = (t.row_stride, t.shape[0]);
        self.view(of, vec![rows, range.len()], range.start, stride)
    }

    /// Frames `range` of a video tensor.
    ///
    /// # Panics
    /// If the range does not lie within the tensor.
    pub fn frames(&mut self, of: TensorId, range: Range<usize>) -> TensorId {
        let t = self.tensor(of);
        let contiguous = t.shape.len() == 4 && t.is_contiguous();
        assert!(contiguous && range.end <= t.shape[0], "frames {range:?} of {:?}", t.shape);
        let (shape, stride) = (t.shape.clone(), t.row_stride);
        let skip = range.start * shape[1..].iter().product::<usize>();
        self.view(of, [&[range.len()], &shape[1..]].concat(), skip, stride)
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the tensor is not contiguous or the number of elements differs.
    pub fn reshape(&mut self, of: TensorId, shape: &[usize]) -> TensorId {
        let t = self.tensor(of);
        assert!(t.is_contiguous() && t.len() == shape.iter().product::<usize>(), "{shape:?}");
        self.view(of, shape.to_vec(), 0, shape.last().copied().unwrap_or(1))
    }

    /// The weight called `name`, which must have `shape` in the checkpoint.
    ///
    /// # Panics
    /// If the same name was used with another shape before.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> WeightId {
        if let Some(&id) = self.weight_ids.get(name) {
            assert_eq!(self.weights[id.index()].shape, shape, "weight {name}");
            return id;
        }
        let id = WeightId(self.weights.len() as u32);
        self.weights.push(Weight { name: name.to_string(), shape: shape.to_vec() });
        self.weight_ids.insert(name.to_string(), id);
        id
    }

    /// Names what is recorded from now on, for messages and profiles.
    pub fn scope(&mut self, name: impl Into<String>) {
        self.scope = name.into();
    }

    /// Begins the block `name`; returns what [`Graph::close_block`] needs.
    pub fn open_block(&mut self, name: &str) -> usize {
        self.scope = name.to_string();
        self.nodes.len()
    }

    /// Ends the block that began at node `first`.
    pub fn close_block(&mut self, name: &str, first: usize) {
        self.blocks.push(Block { name: name.to_string(), nodes: first..self.nodes.len() });
    }

    /// Records `op` with a fresh output of the first floating-point input's type.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when the shapes do not fit.
    pub fn push(&mut self, op: Op, inputs: &[TensorId]) -> Result<TensorId> {
        let dtype = self.tensor(inputs[0]).dtype;
        self.push_as(op, inputs, dtype)
    }

    /// Records `op` with a fresh output of type `dtype`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when the shapes do not fit.
    pub fn push_as(&mut self, op: Op, inputs: &[TensorId], dtype: DType) -> Result<TensorId> {
        let shape = shape::infer(self, &op, inputs)?;
        let output = self.empty(&shape, dtype);
        self.record(op, inputs, output);
        Ok(output)
    }

    /// Records `op` with `output` as the place it writes (or updates).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when the shapes do not fit.
    pub fn push_into(&mut self, op: Op, inputs: &[TensorId], output: TensorId) -> Result<()> {
        let shape = shape::infer(self, &op, inputs)?;
        let found = self.tensor(output);
        let fits = match op {
            // Tokens become an image here; the output says of which extent.
            Op::Unpatchify => found.len() == shape.iter().product::<usize>(),
            _ => found.shape == shape,
        };
        if !fits {
            return Err(Error::model(format!(
                "{} ({}) gives {shape:?}, its place has {:?}",
                self.scope,
                op.name(),
                found.shape
            )));
        }
        self.record(op, inputs, output);
        Ok(())
    }

    /// Records a causal convolution. With `carry` the frames the next run needs are kept
    /// in a state named after the weight; without, the video is taken as whole.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when the shapes do not fit.
    pub fn conv3d(&mut self, spec: ConvSpec, inputs: &[TensorId], carry: bool) -> Result<TensorId> {
        let shape = shape::infer(self, &Op::Conv3d(spec.clone()), inputs)?;
        let output = self.empty(&shape, self.tensor(inputs[0]).dtype);
        self.conv3d_into(spec, inputs, carry, output)?;
        Ok(output)
    }

    /// As [`Graph::conv3d`], with `output` as the place it writes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when the shapes do not fit.
    pub fn conv3d_into(
        &mut self,
        spec: ConvSpec,
        inputs: &[TensorId],
        carry: bool,
        output: TensorId,
    ) -> Result<()> {
        let x = self.tensor(inputs[0]);
        let (dtype, carried) = (x.dtype, spec.carried_frames());
        let shape = [&[carried], &x.shape[1..]].concat();
        let name = self.weights[spec.weight.index()].name.clone();
        self.push_into(Op::Conv3d(spec), inputs, output)?;
        if carry && carried > 0 {
            let state = self.add(&name, &shape, dtype, Role::State);
            if let Some(node) = self.nodes.last_mut() {
                node.state = Some(state);
            }
        }
        Ok(())
    }

    /// Declares that the last `count` nodes may run at the same time, in any order: a backend
    /// can make one launch of them where each alone would leave a device idle.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when one of them touches what another writes.
    pub fn side_by_side(&mut self, count: usize) -> Result<()> {
        let first = self.nodes.len().saturating_sub(count);
        for (i, a) in self.nodes.iter().enumerate().skip(first) {
            for (j, b) in self.nodes.iter().enumerate().skip(first) {
                let touched = b.inputs.iter().chain([&b.output]);
                let depends = i != j && touched.into_iter().any(|&t| self.overlap(a.output, t));
                if depends || a.state.is_some() {
                    let (a, b) = (a.op.name(), b.op.name());
                    return Err(Error::model(format!(
                        "{}: {a} and {b} cannot run at the same time",
                        self.scope
                    )));
                }
            }
        }
        self.nodes.iter_mut().skip(first + 1).for_each(|node| node.beside = true);
        Ok(())
    }

    fn record(&mut self, op: Op, inputs: &[TensorId], output: TensorId) {
        let (inputs, label) = (inputs.to_vec(), self.scope.clone());
        self.nodes.push(Node { op, inputs, output, state: None, beside: false, label });
    }
}
