//! Services in the maps, as the controller would write them.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use aya::Pod;
use sheave::model::desired::Algorithm;
use sheave::plan::spread;
use sheave_common::backend::{Backend, IDS_PER_ELEMENT, TableElement, flags as backend_flags};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags as frontend_flags};
use sheave_common::{Address, Ipv4Address, Ipv6Address, filter, names};

use super::Programs;
use crate::family::Family;

/// A service port for [`Programs::service`].
pub struct Service {
    /// Its id.
    pub id: u32,
    /// Frontends of either family, with bits of [`sheave_common::frontend::flags`].
    pub frontends: Vec<(SocketAddr, u32)>,
    /// Protocol number.
    pub protocol: u8,
    /// Endpoints: address, and whether it is on this node. A frontend gets those of its family.
    pub endpoints: Vec<(SocketAddr, bool)>,
    /// Affinity time-out in seconds.
    pub affinity: u32,
}

impl Programs {
    /// How services that are written from now on choose their backends; at random if it isn't called.
    pub fn set_algorithm(&mut self, algorithm: Algorithm) {
        self.algorithm = algorithm;
    }

    /// Writes a service port's backends, table runs and frontends, and returns its backend ids in order.
    pub fn service(&mut self, service: &Service) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (address, local) in &service.endpoints {
            let id = self.next_backend;
            self.next_backend += 1;
            match address.ip() {
                IpAddr::V4(ip) => {
                    self.backend(names::BACKENDS4, id, service, Ipv4Address::from(ip), address, *local)?;
                }
                IpAddr::V6(ip) => {
                    self.backend(names::BACKENDS6, id, service, Ipv6Address::from(ip), address, *local)?;
                }
            }
            ids.push(id);
        }
        for family in Family::BOTH {
            let of_family = |address: &SocketAddr| Family::of(address.ip()) == family;
            if !service.frontends.iter().any(|(address, _)| of_family(address)) {
                continue;
            }
            let mine = || ids.iter().zip(&service.endpoints).filter(|(_, (address, _))| of_family(address));
            let cluster: Vec<_> = mine().map(|(id, (address, _))| (*address, 1, *id)).collect();
            let local: Vec<_> =
                mine().filter(|(_, (_, local))| *local).map(|(id, (address, _))| (*address, 1, *id)).collect();
            let (cluster, local) = (spread(self.algorithm, &cluster), spread(self.algorithm, &local));
            let (cluster, local) = (self.run(&cluster)?, self.run(&local)?);
            for (address, flags) in service.frontends.iter().filter(|(address, _)| of_family(address)) {
                let frontend = Frontend {
                    version: self.next_version(),
                    service_id: service.id,
                    flags: *flags,
                    cluster,
                    local,
                    affinity_seconds: service.affinity,
                    algorithm: self.algorithm as u32,
                };
                let (port_be, protocol) = (address.port().to_be(), service.protocol);
                match address.ip() {
                    IpAddr::V4(ip) => {
                        self.frontend(names::FRONTENDS4, Ipv4Address::from(ip), port_be, protocol, frontend)?;
                    }
                    IpAddr::V6(ip) => {
                        self.frontend(names::FRONTENDS6, Ipv6Address::from(ip), port_be, protocol, frontend)?;
                    }
                }
            }
        }
        Ok(ids)
    }

    fn backend<A: Address>(
        &mut self,
        map: &str,
        id: u32,
        service: &Service,
        address: A,
        endpoint: &SocketAddr,
        local: bool,
    ) -> Result<()>
    where
        Backend<A>: Pod,
    {
        let mut flags = backend_flags::IN_CLUSTER_SET | backend_flags::SERVING;
        if local {
            flags |= backend_flags::LOCAL | backend_flags::IN_LOCAL_SET;
        }
        if self.algorithm == Algorithm::LeastConnections {
            flags |= backend_flags::COUNTED;
        }
        let backend = Backend {
            version: self.next_version(),
            service_id: service.id,
            address,
            port_be: endpoint.port().to_be(),
            weight: 1,
            flags,
            reserved: A::FILL,
        };
        Ok(self.hash::<u32, Backend<A>>(map)?.insert(id, backend, 0)?)
    }

    /// Writes a frontend and, where its kind asks for one, the mark on its address.
    fn frontend<A: Address>(
        &mut self,
        map: &str,
        address: A,
        port_be: u16,
        protocol: u8,
        frontend: Frontend,
    ) -> Result<()>
    where
        FrontendKey<A>: Pod,
    {
        let mark = if frontend.flags & frontend_flags::CLUSTER_IP != 0 {
            frontend_flags::WHOLE_ADDRESS
        } else if frontend.flags & (frontend_flags::LOAD_BALANCER | frontend_flags::EXTERNAL_IP) != 0 {
            frontend_flags::SERVICE_ADDRESS
        } else {
            0
        };
        self.let_in(&address)?;
        self.hash::<FrontendKey<A>, Frontend>(map)?.insert(
            FrontendKey::new(address, port_be, protocol),
            frontend,
            0,
        )?;
        if mark != 0 {
            let marked = Frontend {
                version: self.next_version(),
                service_id: 0,
                flags: mark,
                cluster: BackendSet::default(),
                local: BackendSet::default(),
                affinity_seconds: 0,
                algorithm: 0,
            };
            self.hash::<FrontendKey<A>, Frontend>(map)?.insert(FrontendKey::mark(address), marked, 0)?;
        }
        Ok(())
    }

    /// Writes the mark on a service address, as the controller does.
    pub fn mark(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let mark = Frontend {
            version: self.next_version(),
            service_id: 0,
            flags,
            cluster: BackendSet::default(),
            local: BackendSet::default(),
            affinity_seconds: 0,
            algorithm: 0,
        };
        match address {
            IpAddr::V4(address) => {
                let key = FrontendKey::mark(Ipv4Address::from(address));
                self.let_in(&key.address)?;
                self.hash::<_, Frontend>(names::FRONTENDS4)?.insert(key, mark, 0)?;
            }
            IpAddr::V6(address) => {
                let key = FrontendKey::mark(Ipv6Address::from(address));
                self.let_in(&key.address)?;
                self.hash::<_, Frontend>(names::FRONTENDS6)?.insert(key, mark, 0)?;
            }
        }
        Ok(())
    }

    /// Has the programs look for packets to an address, as the controller does for a frontend's and the programs for the
    /// source of packets that they redirect.
    pub fn let_in<A: Address>(&mut self, to: &A) -> Result<()> {
        Ok(self.array::<u32>(names::DESTINATIONS)?.set(filter::element(to), 1, 0)?)
    }

    /// Has the programs look for packets from an address, as they do themselves for the backend of a flow that was last seen
    /// in that second.
    pub fn let_out<A: Address>(&mut self, from: &A, second: u32) -> Result<()> {
        Ok(self.array::<u32>(names::SOURCES)?.set(filter::element(from), second, 0)?)
    }

    fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    fn run(&mut self, ids: &[u32]) -> Result<BackendSet> {
        let first = self.table_used;
        let mut table = self.array::<TableElement>(names::BACKEND_TABLE)?;
        for (element, ids) in (first / IDS_PER_ELEMENT..).zip(ids.chunks(IDS_PER_ELEMENT as usize)) {
            table.set(element, [ids[0], ids.get(1).copied().unwrap_or(0)], 0)?;
        }
        let length = u32::try_from(ids.len())?;
        self.table_used += length.next_multiple_of(IDS_PER_ELEMENT);
        Ok(BackendSet { first, length })
    }
}
