//! The values that the plan reads and writes: map elements without what only the writer knows (versions, layout).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use sheave_common::frontend::BackendSet;

use super::diff::PlanError;
use crate::model::desired::{Protocol, ServicePortName};
use crate::model::network::Network;

/// Key of a frontend, of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress {
    /// Address.
    pub address: IpAddr,
    /// Port, machine order; 0 for the mark on a whole address.
    pub port: u16,
    /// IP protocol number; 0 for the mark on a whole address.
    pub protocol: u8,
}

impl FrontendAddress {
    /// The key of a service port's frontend.
    #[must_use]
    pub fn new(address: SocketAddr, protocol: u8) -> Self {
        Self { address: address.ip(), port: address.port(), protocol }
    }

    /// The key of the mark on a whole address.
    #[must_use]
    pub const fn mark(address: IpAddr) -> Self {
        Self { address, port: 0, protocol: 0 }
    }

    /// Whether this is the key of a mark on a whole address.
    #[must_use]
    pub const fn is_mark(&self) -> bool {
        self.port == 0 && self.protocol == 0
    }

    /// Address and port.
    #[must_use]
    pub const fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Protocol::from_number(self.protocol) {
            Some(protocol) => write!(f, "{}/{protocol}", self.socket()),
            None if self.is_mark() => write!(f, "the address {}", self.address),
            None => write!(f, "{}, protocol {}", self.socket(), self.protocol),
        }
    }
}

/// A frontend's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Service port; 0 for a mark.
    pub service_id: u32,
    /// Bits of [`sheave_common::frontend::flags`].
    pub flags: u32,
    /// Run of the cluster set.
    pub cluster: BackendSet,
    /// Run of the local set.
    pub local: BackendSet,
    /// Session affinity time-out, 0 for none.
    pub affinity_seconds: u32,
    /// One of [`sheave_common::frontend::algorithm`].
    pub algorithm: u32,
}

impl Frontend {
    /// The mark on an address: [`frontend::flags::WHOLE_ADDRESS`] or [`frontend::flags::SERVICE_ADDRESS`], perhaps with
    /// [`frontend::flags::HAS_ENDPOINT`].
    #[must_use]
    pub const fn mark(flags: u32) -> Self {
        let none = BackendSet { first: 0, length: 0 };
        Self { service_id: 0, flags, cluster: none, local: none, affinity_seconds: 0, algorithm: 0 }
    }
}

/// A backend's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Service port that it serves.
    pub service_id: u32,
    /// Endpoint address.
    pub address: IpAddr,
    /// Endpoint port, machine order.
    pub port: u16,
    /// Relative share of new connections.
    pub weight: u16,
    /// Bits of [`sheave_common::backend::flags`].
    pub flags: u32,
}

impl Backend {
    /// Address and port.
    #[must_use]
    pub const fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// One write to one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// `config`: ids below these may be in use from now on.
    Reserve {
        /// Smallest backend id that is certainly unused.
        next_backend_id: u32,
        /// Smallest service id that was certainly never used.
        next_service_id: u32,
    },
    /// `service_names`: which service port an id is.
    PutName {
        /// The id.
        service_id: u32,
        /// Its service port.
        name: ServicePortName,
    },
    /// `backends4/6`: a new backend, or an old one with other flags.
    PutBackend {
        /// Backend id.
        id: u32,
        /// Its value.
        backend: Backend,
    },
    /// `backend_table`: a run that no frontend names.
    WriteRun {
        /// Index of its first backend id.
        first: u32,
        /// Backend ids.
        ids: Vec<u32>,
    },
    /// `source_ranges4/6`: these clients may use a service port's load-balancer IPs.
    PutSourceRange {
        /// Service port.
        service_id: u32,
        /// The clients.
        network: Network,
    },
    /// `source_ranges4/6`.
    DeleteSourceRange {
        /// Service port.
        service_id: u32,
        /// The clients.
        network: Network,
    },
    /// `frontends4/6`: a new element, or one replaced as a whole.
    PutFrontend {
        /// Key.
        address: FrontendAddress,
        /// Value.
        frontend: Frontend,
    },
    /// `frontends4/6`.
    DeleteFrontend {
        /// Key.
        address: FrontendAddress,
    },
    /// `backends4/6`.
    DeleteBackend {
        /// Backend id.
        id: u32,
        /// Service port that it served.
        service_id: u32,
        /// Its endpoint, whose address tells the family.
        endpoint: SocketAddr,
    },
    /// `service_names`.
    DeleteName {
        /// The id.
        service_id: u32,
    },
}

/// Who suffers when a write fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Everyone: nothing after it may be written.
    Batch,
    /// This service port: its later writes are skipped, and it is planned again with the next batch.
    Service(ServicePortName),
    /// No one: a left-over of unknown origin.
    Nobody,
}

/// A write and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Whose.
    pub owner: Owner,
    /// What.
    pub write: Write,
}

/// Writes in the order in which they must be made.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The writes.
    pub operations: Vec<Operation>,
    /// Service ports that could not be planned; the others are not affected.
    pub refused: BTreeMap<ServicePortName, PlanError>,
}

/// Why a service port is not in the kernel as desired.
#[derive(Debug, thiserror::Error)]
pub enum Failure<E> {
    /// It could not be planned.
    #[error(transparent)]
    Plan(PlanError),
    /// A write failed.
    #[error(transparent)]
    Write(E),
}

/// What became of a batch.
#[derive(Debug)]
pub struct Outcome<E> {
    /// Writes made.
    pub written: usize,
    /// Service ports that are not as desired; they are part of the next plan.
    pub failed: BTreeMap<ServicePortName, Failure<E>>,
    /// A failure that concerns no service port, or the one that ended the batch.
    pub other: Option<E>,
}
