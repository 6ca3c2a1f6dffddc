//! The macro that pins a map type's layout at compile time.

/// Asserts a type's size and each field's offset, asserts that the fields fill it without a gap, and, in userspace,
/// makes it usable with aya's maps.
///
/// Fields are listed in order with their offset and size; the last one must end at the type's size.
macro_rules! layout {
    ($type:ty, size $size:literal, { $($field:ident @ $offset:literal + $length:literal),+ $(,)? }) => {
        const _: () = {
            assert!(size_of::<$type>() == $size, "size");
            let mut end = 0;
            $(
                assert!(core::mem::offset_of!($type, $field) == $offset, "offset");
                assert!($offset == end, "gap before the field");
                end = $offset + $length;
            )+
            assert!(end == $size, "padding at the end");
        };
        $crate::layout::pod!($type);
    };
}

/// Makes a padding-free type usable with aya's maps in userspace.
macro_rules! pod {
    ($type:ty) => {
        #[cfg(feature = "user")]
        // SAFETY: the type is `repr(C)`, made of integers only, and the layout assert shows that it has no padding.
        unsafe impl aya::Pod for $type {}
    };
}

pub(crate) use {layout, pod};
