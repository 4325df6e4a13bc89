//! iceoryx2, request and response over its `ipc` service. Both sides poll without a pause, and the service has room for
//! one client and one server: as in its own request-response benchmark, only between two processes, and from a
//! request to its own response.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iceoryx2::port::client::Client;
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::request_response::PortFactory as Pattern;
use iceoryx2::testing::remove_global_mgmt_segment;

use crate::Result;
use crate::cpus::Cpus;
use crate::floor::{check, operands};
use crate::measure::Row;
use crate::process::{Caller, Peer};

pub const NAME: &str = "peer/iceoryx2";

/// Both request and response.
#[derive(Clone, Copy, Debug, ZeroCopySend)]
#[repr(C)]
struct Message {
    what: u64,
    words: [u64; 7],
}

const SERVICE: &str = "compare";
const CLEANUP_LIMIT: Duration = Duration::from_secs(5);

const ADD: u64 = 0;
/// The server goes back to its gate.
const LEAVE: u64 = 1;

/// Dropped in this order: the client, the server with its process, our node, and what is left of the domain.
pub struct IceoryxRow {
    client: Client<ipc::Service, Message, (), Message, ()>,
    peer: Peer,
    _service: Pattern<ipc::Service, Message, (), Message, ()>,
    _node: Node<ipc::Service>,
    _domain: OwnDomain,
}

impl IceoryxRow {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        cpus.require_two()?;
        remove_abandoned_domains();
        let domain = OwnDomain(Domain::of_process(std::process::id()));
        let node = domain.0.node()?;
        let service = node
            .service_builder(&SERVICE.try_into()?)
            .request_response::<Message, Message>()
            .max_clients(1)
            .max_servers(1)
            .max_response_buffer_size(1)
            .create()?;
        let peer = Peer::start(cpus, NAME, &[&std::process::id().to_string()], &[])?;
        let client = service.client_builder().create()?;
        Ok(Self { client, peer, _service: service, _node: node, _domain: domain })
    }

    #[inline(always)]
    fn exchange(&self, request: Message) -> Message {
        let request = self.client.loan_uninit().expect("a request can be loaned").write_payload(request);
        let pending = request.send().expect("the request can be sent");
        loop {
            if let Some(response) = pending.receive().expect("the connection is sound") {
                return *response;
            }
        }
    }
}

impl Row for IceoryxRow {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        let response = self.exchange(Message { what: ADD, words: [a as u64, b as u64, 0, 0, 0, 0, 0] });
        check(response.words[0] as i32, (a, b));
    }

    fn wake(&mut self) {
        self.peer.wake();
    }

    fn rest(&mut self) {
        self.exchange(Message { what: LEAVE, words: [0; 7] });
    }
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let node = Domain::of_process(caller.argument(0)?.parse()?).node()?;
    let service = node.service_builder(&SERVICE.try_into()?).request_response::<Message, Message>().open()?;
    let server = service.server_builder().create()?;
    caller.ready()?;
    while caller.wait_at_gate() {
        let mut awake = true;
        while awake {
            let Some(request) = server.receive()? else { continue };
            let mut answer = *request;
            awake = answer.what != LEAVE;
            answer.words[0] = crate::add(answer.words[0] as i32, answer.words[1] as i32) as u64;
            request.loan_uninit()?.write_payload(answer).send()?;
        }
    }
    Ok(())
}

/// The files and segments of one run: neither other users of iceoryx2 nor another run of this bench see them.
struct Domain {
    root: PathBuf,
    prefix: String,
}

const ROOT_NAME: &str = "hotcell-compare-iceoryx2-";

impl Domain {
    fn of_process(caller: u32) -> Self {
        Self {
            root: env::temp_dir().join(format!("{ROOT_NAME}{caller}")),
            prefix: format!("hotcell_compare_{caller}_"),
        }
    }

    fn config(&self) -> Result<Config> {
        let root = self.root.to_str().ok_or("the temporary directory's name is not text")?;
        let mut config = Config::default();
        config.global.set_root_path(&root.try_into()?);
        config.global.prefix = self.prefix.as_str().try_into()?;
        Ok(config)
    }

    /// A node that leaves Ctrl-C alone.
    fn node(&self) -> Result<Node<ipc::Service>> {
        set_log_level(LogLevel::Error);
        let builder = NodeBuilder::new().config(&self.config()?);
        Ok(builder.signal_handling_mode(SignalHandlingMode::Disabled).create::<ipc::Service>()?)
    }
}

/// Removes its domain when it is dropped; both processes must be done with it by then.
struct OwnDomain(Domain);

impl OwnDomain {
    /// Nodes, ports and services removed their own files when they were dropped. What iceoryx2 keeps for the next
    /// process is its directories and the domain's management segment; this domain will have no next process.
    fn remove(&self) -> Result<()> {
        let config = self.0.config()?;
        // SAFETY: the domain belongs to one run of the bench, and both of its processes are done with it.
        unsafe { remove_global_mgmt_segment::<ipc::Service>(&config) }?;
        Ok(fs::remove_dir_all(&self.0.root)?)
    }
}

impl Drop for OwnDomain {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("iceoryx2: {} is not quite removed: {error}", self.0.root.display());
        }
    }
}

/// Removes what runs left behind that were killed: first the resources of their nodes, in the documented way.
fn remove_abandoned_domains() {
    for entry in fs::read_dir(env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let caller = name.to_str().and_then(|name| name.strip_prefix(ROOT_NAME)?.parse().ok());
        let Some(caller) = caller.filter(|caller| !Path::new(&format!("/proc/{caller}")).exists()) else {
            continue;
        };
        let domain = OwnDomain(Domain::of_process(caller));
        if let Ok(node) = domain.0.node() {
            node.blocking_cleanup_dead_nodes(CLEANUP_LIMIT);
        }
    }
}
