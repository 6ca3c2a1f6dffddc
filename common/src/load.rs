//! `backend_loads`: backend id (u32) → how many connections the backend has, if its service chooses by them.

/// Value of a backend's load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Load {
    /// Connections that are open. The programs add and take away as they see connections come and go, and the loader sets it
    /// right for those that go unseen: it may be wrong meanwhile, and even negative.
    pub connections: i64,
}

crate::layout::layout!(Load, size 8, { connections @ 0 + 8 });
