//! Servo's `ipc-channel`: a sender and a receiver each way, the messages serialised.

use ipc_channel::ipc::{self, IpcOneShotServer, IpcReceiver, IpcSender};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::cpus::Cpus;
use crate::floor::{check, operands};
use crate::measure::Row;
use crate::process::{Caller, Peer};

pub const NAME: &str = "peer/ipc_channel";

#[derive(Serialize, Deserialize)]
struct Request {
    function: u32,
    a: i32,
    b: i32,
}

#[derive(Serialize, Deserialize)]
struct Reply {
    result: i32,
}

/// What the peer sends first: the caller's ends.
type Ends = (IpcSender<Request>, IpcReceiver<Reply>);

/// Dropped in this order: the peer ends when its requests do.
pub struct ChannelRow {
    requests: IpcSender<Request>,
    replies: IpcReceiver<Reply>,
    _peer: Peer,
}

impl ChannelRow {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        let (server, name) = IpcOneShotServer::<Ends>::new()?;
        let peer = Peer::start(cpus, NAME, &[&name], &[])?;
        let (_, (requests, replies)) = server.accept()?;
        Ok(Self { requests, replies, _peer: peer })
    }
}

impl Row for ChannelRow {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        self.requests.send(Request { function: 0, a, b }).expect("the peer receives");
        check(self.replies.recv().expect("the peer answers").result, (a, b));
    }
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let (request_sender, requests) = ipc::channel::<Request>()?;
    let (replies, reply_receiver) = ipc::channel::<Reply>()?;
    IpcSender::connect(caller.argument(0)?.to_owned())?.send((request_sender, reply_receiver))?;
    caller.ready()?;
    while let Ok(request) = requests.recv() {
        if request.function != 0 {
            return Err("no such function".into());
        }
        replies.send(Reply { result: crate::add(request.a, request.b) })?;
    }
    Ok(())
}
