//! Our own calls by pipeline, as a stream.

use std::rc::Rc;

use hotcell::{PIPELINE_DEPTH, Pipeline};

use crate::Result;
use crate::cell::Cell;
use crate::stream::{Add, Stream};

/// A pipeline in a worker of its own.
pub struct Pipelined {
    pipeline: Pipeline<Add>,
    _cell: Rc<Cell>,
}

impl Pipelined {
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        let add = cell.module.function::<Add>("add")?;
        Ok(Self { pipeline: add.pipeline()?, _cell: Rc::clone(cell) })
    }
}

impl Stream for Pipelined {
    const ROOM: u64 = PIPELINE_DEPTH;

    #[inline(always)]
    fn send(&mut self, a: i32, b: i32) {
        self.pipeline.send(a, b).expect("there is room");
    }

    #[inline(always)]
    fn receive(&mut self) -> i32 {
        self.pipeline.receive().expect("the worker lives").expect("a call is in flight")
    }
}
