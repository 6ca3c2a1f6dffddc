//! Between the plan's values and map elements: byte order, layout, versions.

use std::net::{IpAddr, SocketAddr};

use sheave_common::backend::{self, IDS_PER_ELEMENT, TableElement};
use sheave_common::frontend::{self, FrontendKey};
use sheave_common::service_name::ServiceName;
use sheave_common::{Address, Ipv4Address, Ipv6Address};

use crate::model::desired::{Protocol, ServiceKey, ServicePortName};
use crate::model::text::intern;
use crate::plan::{Backend, Frontend, FrontendAddress, Operation, Write};

pub(super) fn key<A, S: Into<A>>(address: &FrontendAddress, ip: S) -> FrontendKey<A> {
    FrontendKey::new(ip.into(), address.port.to_be(), address.protocol)
}

pub(super) fn frontend_value(frontend: &Frontend, version: u64) -> frontend::Frontend {
    frontend::Frontend {
        version,
        service_id: frontend.service_id,
        flags: frontend.flags,
        cluster: frontend.cluster,
        local: frontend.local,
        affinity_seconds: frontend.affinity_seconds,
        algorithm: frontend.algorithm,
    }
}

pub(super) fn backend_value<A: Address, S: Into<A>>(
    backend: &Backend,
    address: S,
    version: u64,
) -> backend::Backend<A> {
    backend::Backend {
        version,
        service_id: backend.service_id,
        address: address.into(),
        port_be: backend.port.to_be(),
        weight: backend.weight,
        flags: backend.flags,
        reserved: A::FILL,
    }
}

/// The elements of writes that put backends of one family, with a version each.
pub(super) fn backends<A: Ip>(operations: &[Operation], versions: Vec<u64>) -> Vec<(u32, backend::Backend<A>)> {
    let element = |(operation, version): (&Operation, u64)| match &operation.write {
        Write::PutBackend { id, backend } => Some((*id, backend_value(backend, A::of(backend.address)?, version))),
        _ => None,
    };
    operations.iter().zip(versions).map_while(element).collect()
}

/// The elements of writes that put frontends of one family, with a version each.
pub(super) fn frontends<A: Ip>(
    operations: &[Operation],
    versions: Vec<u64>,
) -> Vec<(FrontendKey<A>, frontend::Frontend)> {
    let element = |(operation, version): (&Operation, u64)| match &operation.write {
        Write::PutFrontend { address, frontend } => {
            Some((key(address, A::of(address.address)?), frontend_value(frontend, version)))
        }
        _ => None,
    };
    operations.iter().zip(versions).map_while(element).collect()
}

/// The elements of writes that put names.
pub(super) fn names(operations: &[Operation]) -> Vec<(u32, ServiceName)> {
    let element = |operation: &Operation| match &operation.write {
        Write::PutName { service_id, name } => Some((*service_id, name_value(name)?)),
        _ => None,
    };
    operations.iter().map_while(element).collect()
}

/// The elements of a run of the backend table, which are its alone.
pub(super) fn run(first: u32, ids: &[u32]) -> impl Iterator<Item = (u32, TableElement)> {
    let element = |ids: &[u32]| std::array::from_fn(|index| ids.get(index).copied().unwrap_or(0));
    (first / IDS_PER_ELEMENT..).zip(ids.chunks(IDS_PER_ELEMENT as usize).map(element))
}

/// The value of a service port's name; `None` if it does not fit.
pub(super) fn name_value(name: &ServicePortName) -> Option<ServiceName> {
    ServiceName::new(name.protocol.number(), &name.to_string())
}

/// An address of either family for the plan.
pub(super) trait Ip: Address {
    fn ip(self) -> IpAddr;
    /// `None` for one of the other family.
    fn of(ip: IpAddr) -> Option<Self>;
}

impl Ip for Ipv4Address {
    fn ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }

    fn of(ip: IpAddr) -> Option<Self> {
        if let IpAddr::V4(ip) = ip { Some(ip.into()) } else { None }
    }
}

impl Ip for Ipv6Address {
    fn ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }

    fn of(ip: IpAddr) -> Option<Self> {
        if let IpAddr::V6(ip) = ip { Some(ip.into()) } else { None }
    }
}

pub(super) fn plan_frontend<A: Ip>((key, value): &(FrontendKey<A>, frontend::Frontend)) -> (FrontendAddress, Frontend) {
    let address = SocketAddr::new(key.address.ip(), u16::from_be(key.port_be));
    let frontend = Frontend {
        service_id: value.service_id,
        flags: value.flags,
        cluster: value.cluster,
        local: value.local,
        affinity_seconds: value.affinity_seconds,
        algorithm: value.algorithm,
    };
    (FrontendAddress::new(address, key.protocol), frontend)
}

pub(super) fn plan_backend<A: Ip>((id, value): &(u32, backend::Backend<A>)) -> (u32, Backend) {
    let backend = Backend {
        service_id: value.service_id,
        address: value.address.ip(),
        port: u16::from_be(value.port_be),
        weight: value.weight,
        flags: value.flags,
    };
    (*id, backend)
}

/// The service port that a name in the map `service_names` stands for; `None` for what this program did not write.
#[must_use]
pub fn read_name(name: &ServiceName) -> Option<ServicePortName> {
    let (namespace, rest) = name.as_str()?.split_once('/')?;
    let (service, port) = rest.split_once(':').unwrap_or((rest, ""));
    let service = ServiceKey { namespace: intern(namespace), name: intern(service) };
    Some(ServicePortName { service, port: intern(port), protocol: Protocol::from_number(name.protocol)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_the_map_is_read_back_as_the_service_port_it_was_written_for() {
        for port in ["", "http"] {
            let service = ServiceKey { namespace: "kube-system".into(), name: "dns".into() };
            let name = ServicePortName { service, port: port.into(), protocol: Protocol::Udp };
            let stored = ServiceName::new(name.protocol.number(), &name.to_string()).expect("it fits");
            assert_eq!(read_name(&stored), Some(name));
        }
    }
}
