//! Interfaces of a real kernel are found and followed: a pod that no program is attached to has no Services, and one
//! that inherits another's index must not inherit its flows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use sheave::config::InterfaceRules;
use sheave::interfaces::{self, Event, Interface, Role};
use sheave_tests::netns::Namespace;
use tokio::sync::{mpsc, watch};

const LIMIT: Duration = Duration::from_secs(10);

/// A machine with pods' namespace beside it, and a watch on its interfaces. The watch runs only while this waits.
struct Watched {
    host: Namespace,
    pods: Namespace,
    events: mpsc::Receiver<Event>,
    node_addresses: watch::Sender<Vec<IpAddr>>,
    /// What the events add up to.
    present: BTreeMap<u32, Interface>,
    addresses: Vec<IpAddr>,
    /// Everything told since the last [`Self::forget`].
    told: Vec<Event>,
}

/// Runs a scenario in a namespace of its own, the watch included.
fn scenario(prepare: &[&str], play: impl AsyncFnOnce(&mut Watched) -> Result<()> + Send) -> Result<()> {
    let (host, pods) = (Namespace::new("host")?, Namespace::new("pods")?);
    let inside = host.clone();
    inside.run(move || {
        let prepared: Vec<String> = prepare.iter().map(|command| command.replace("PODS", &pods.path())).collect();
        host.ip(&prepared)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (sender, events) = mpsc::channel(64);
            let (node_addresses, known) = watch::channel(Vec::new());
            let watching = tokio::spawn(interfaces::run(InterfaceRules::default(), known, sender));
            let (present, addresses, told) = (BTreeMap::new(), Vec::new(), Vec::new());
            let mut watched = Watched { host, pods, events, node_addresses, present, addresses, told };
            watched.until("the first listing", |watched| watched.told.contains(&Event::Synced)).await?;
            play(&mut watched).await?;
            ensure!(!watching.is_finished(), "the watch ended: {:?}", watching.await);
            Ok(())
        })
    })
}

impl Watched {
    /// Runs `ip` commands on the machine; `PODS` is the pods' namespace.
    fn ip(&self, commands: &[&str]) -> Result<()> {
        let commands: Vec<String> = commands.iter().map(|command| command.replace("PODS", &self.pods.path())).collect();
        self.host.ip(&commands)
    }

    fn forget(&mut self) {
        self.told.clear();
    }

    /// Takes events until something is so.
    async fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) -> Result<()> {
        let waited = tokio::time::timeout(LIMIT, async {
            while !so(self) {
                self.take().await?;
            }
            Ok(())
        });
        match waited.await {
            Ok(result) => result,
            Err(_) => bail!("not within {LIMIT:?}: {what}; present {:?}, told {:?}", self.roles(), self.told),
        }
    }

    /// Takes what is told within a moment, and wants it to be nothing.
    async fn quiet(&mut self, why: &str) -> Result<()> {
        self.forget();
        let event = tokio::time::timeout(Duration::from_millis(200), self.take()).await;
        ensure!(event.is_err(), "{why}, and yet: {:?}", self.told);
        Ok(())
    }

    async fn take(&mut self) -> Result<()> {
        let event = self.events.recv().await.context("the watch ended")?;
        match &event {
            Event::Present(interface) => {
                self.present.insert(interface.index, interface.clone());
            }
            Event::Gone { index } => {
                ensure!(self.present.remove(index).is_some(), "index {index} is gone and never was there");
            }
            Event::Addresses(addresses) => self.addresses.clone_from(addresses),
            Event::Synced => {}
        }
        self.told.push(event);
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&Interface> {
        self.present.values().find(|interface| interface.name == name)
    }

    fn is(&self, name: &str, role: Role) -> bool {
        self.find(name).is_some_and(|interface| interface.role == role)
    }

    fn roles(&self) -> BTreeSet<(String, Role)> {
        self.present.values().map(|interface| (interface.name.clone(), interface.role)).collect()
    }

    fn source4(&self, name: &str) -> Option<String> {
        self.find(name)?.source4.map(|address| address.to_string())
    }
}

#[test]
fn what_exists_at_the_start_is_reported_before_synced() -> Result<()> {
    let prepare = [
        "link add eth0 type veth peer name far netns PODS",
        "addr add 192.0.2.10/24 dev eth0",
        "link set eth0 up",
        "route add default via 192.0.2.1 dev eth0",
        "link add cni0 type bridge",
        "addr add 10.244.0.1/24 dev cni0",
        "link add pod1 master cni0 type veth peer name p1 netns PODS",
        "link add pod2 type veth peer name p2 netns PODS",
        "link add vx type vxlan id 7 dstport 4789 dev eth0",
        "addr add 10.244.0.0/32 dev vx",
        "link add inner0 type veth peer name inner1",
    ];
    scenario(&prepare, async |watched| {
        let expected = [("eth0", Role::Uplink), ("pod1", Role::Pod), ("pod2", Role::Pod), ("vx", Role::Tunnel)];
        assert_eq!(watched.roles(), expected.map(|(name, role)| (name.to_owned(), role)).into());
        assert_eq!(watched.source4("eth0").as_deref(), Some("192.0.2.10"));
        assert_eq!(watched.source4("vx").as_deref(), Some("10.244.0.0"));
        assert_eq!(watched.source4("pod2").as_deref(), Some("192.0.2.10"));
        let addresses: Vec<String> = watched.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.244.0.0", "10.244.0.1", "192.0.2.10"]);
        assert_eq!(watched.told.last(), Some(&Event::Synced));
        watched.quiet("nothing changed").await
    })
}

#[test]
fn pods_appear_and_disappear() -> Result<()> {
    scenario(&[], async |watched| {
        watched.ip(&["link add pod1 type veth peer name p1 netns PODS"])?;
        watched.until("a pod", |watched| watched.is("pod1", Role::Pod)).await?;
        let pod = watched.find("pod1").context("pod1")?;
        ensure!(pod.ethernet && !pod.physical, "{pod:?}");
        watched.ip(&["link set pod1 name renamed"])?;
        watched.until("its new name", |watched| watched.is("renamed", Role::Pod)).await?;
        watched.ip(&["link del renamed"])?;
        watched.until("it gone", |watched| watched.present.is_empty()).await
    })
}

/// CNI plugins make the pair on the host and move one end: nothing notifies about the end that stays.
#[test]
fn a_pair_made_here_is_a_pods_when_its_peer_has_moved() -> Result<()> {
    scenario(&[], async |watched| {
        watched.ip(&["link add pod1 type veth peer name p1"])?;
        watched.quiet("both ends are here").await?;
        watched.ip(&["link set p1 netns PODS"])?;
        watched.until("a pod", |watched| watched.is("pod1", Role::Pod)).await
    })
}

#[test]
fn a_reused_index_is_gone_before_it_is_present() -> Result<()> {
    scenario(&["link add pod1 index 77 type veth peer name p1 netns PODS"], async |watched| {
        watched.forget();
        // All of it happens before the watch runs again, so it is one batch.
        watched.ip(&[
            "link del pod1",
            "link add pod1 index 77 type veth peer name p1 netns PODS",
            "link del pod1",
            "link add pod9 index 77 type veth peer name p9 netns PODS",
        ])?;
        watched.until("the new pod", |watched| watched.is("pod9", Role::Pod)).await?;
        let told = &watched.told;
        let gone = told.iter().position(|event| *event == Event::Gone { index: 77 });
        let present = told.iter().position(|event| matches!(event, Event::Present(new) if new.index == 77));
        ensure!(gone.is_some() && gone < present, "{told:?}");
        Ok(())
    })
}

#[test]
fn addresses_and_routes_are_followed() -> Result<()> {
    scenario(&["link add eth0 type veth peer name far netns PODS", "link set eth0 up"], async |watched| {
        watched.until("a pod, as far as one can tell", |watched| watched.is("eth0", Role::Pod)).await?;
        watched.ip(&["addr add 192.0.2.10/24 dev eth0"])?;
        watched.until("an uplink", |watched| watched.is("eth0", Role::Uplink)).await?;
        ensure!(watched.addresses == ["192.0.2.10".parse::<IpAddr>()?], "{:?}", watched.addresses);
        // The second address of a subnet is secondary until the first one goes.
        watched.ip(&["addr add 192.0.2.11/24 dev eth0"])?;
        watched.until("two addresses", |watched| watched.addresses.len() == 2).await?;
        ensure!(watched.source4("eth0").as_deref() == Some("192.0.2.10"), "{:?}", watched.present);
        watched.node_addresses.send(vec!["192.0.2.11".parse()?])?;
        watched.until("the node's address", |watched| watched.source4("eth0").as_deref() == Some("192.0.2.11")).await?;
        watched.node_addresses.send(Vec::new())?;
        watched.until("the primary one", |watched| watched.source4("eth0").as_deref() == Some("192.0.2.10")).await?;
        watched.ip(&["addr flush dev eth0"])?;
        watched.until("a pod again", |watched| watched.is("eth0", Role::Pod)).await?;
        watched.ip(&["addr add 192.0.2.12/32 dev eth0"])?;
        let held: IpAddr = "192.0.2.12".parse()?;
        watched.until("the address", |watched| watched.addresses == [held]).await?;
        ensure!(watched.is("eth0", Role::Pod), "a single address, as CNI plugins give: {:?}", watched.present);
        watched.ip(&["route add default dev eth0"])?;
        watched.until("an uplink by its route", |watched| watched.is("eth0", Role::Uplink)).await?;
        // IPv4 routes of a device that goes down vanish without a notification.
        watched.ip(&["link set eth0 down"])?;
        watched.until("no route, no uplink", |watched| watched.is("eth0", Role::Pod)).await
    })
}

#[test]
fn two_hundred_pods_at_once() -> Result<()> {
    scenario(&[], async |watched| {
        let add: Vec<String> =
            (0..200).map(|n| format!("link add pod{n} type veth peer name p{n} netns PODS")).collect();
        let add: Vec<&str> = add.iter().map(String::as_str).collect();
        watched.ip(&add)?;
        watched.until("200 pods", |watched| watched.present.len() == 200).await?;
        ensure!(watched.present.values().all(|interface| interface.role == Role::Pod));
        let delete: Vec<String> = (0..200).map(|n| format!("link del pod{n}")).collect();
        let delete: Vec<&str> = delete.iter().map(String::as_str).collect();
        watched.ip(&delete)?;
        watched.until("none", |watched| watched.present.is_empty()).await
    })
}

/// The kernel drops notifications for who reads too slowly. What they said must not be lost with them.
#[test]
fn lost_notifications_lose_nothing() -> Result<()> {
    scenario(&["link add pod1 index 77 type veth peer name p1 netns PODS"], async |watched| {
        watched.forget();
        // What is still queued when others are dropped is history, too: pod1 renamed.
        watched.ip(&["link set pod1 name history"])?;
        let noise = (0..20_000).map(|n| format!("link set dev lo mtu {}", 20_000 + n));
        let mut commands: Vec<String> = noise.collect();
        commands.push("link del history".to_owned());
        commands.push("link add pod2 index 77 type veth peer name p2 netns PODS".to_owned());
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        watched.ip(&commands)?;
        watched.until("the new pod", |watched| watched.is("pod2", Role::Pod)).await?;
        let told = &watched.told;
        let gone = told.iter().position(|event| *event == Event::Gone { index: 77 });
        let present = told.iter().position(|event| matches!(event, Event::Present(new) if new.name == "pod2"));
        ensure!(gone.is_some() && gone < present, "{told:?}");
        watched.quiet("history must not come back").await?;
        watched.ip(&["link del pod2"])?;
        watched.until("following goes on", |watched| watched.present.is_empty()).await
    })
}
