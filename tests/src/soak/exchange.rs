//! What is exchanged: bytes that only the right service of the right pod can send or expect.
//!
//! A client opens with [`Hello`]; a pod's server answers with [`Greeting`]. Then frames go to and fro, each filled from a
//! seed of the exchange's nonce, the service, the direction (and in it the pod) and the frame's number. Each side computes
//! what it expects from what it is itself, so a byte for another service, of another pod or of another connection differs.
//! Integers are little-endian.

/// Bytes of a frame.
pub(super) const FRAME: usize = 1_024;

/// Who talks to whom, as the client means it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) nonce: u64,
    pub(super) service: u32,
    /// Of a datagram; 0 in a connection's opening.
    pub(super) number: u32,
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// The question that is answered, with the service that the server is.
    pub(super) hello: Hello,
    pub(super) pod: u32,
}

/// Which way bytes go.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    Up,
    /// Down from a pod.
    Down(u32),
}

impl Hello {
    pub(super) const SIZE: usize = 16;

    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.nonce.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.service.to_le_bytes());
        bytes[12..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Reads the first bytes; `None` if there are fewer.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            nonce: u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?),
            service: u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?),
            number: u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?),
        })
    }

    /// Fills a frame with what must be there.
    pub(super) fn fill(self, direction: Direction, number: u32, frame: &mut [u8]) {
        let way = match direction {
            Direction::Up => u64::MAX,
            Direction::Down(pod) => u64::from(pod),
        };
        let words = [self.nonce, u64::from(self.service), way, u64::from(number)];
        let mix = |seed: u64, word: u64| (seed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        fastrand::Rng::with_seed(words.into_iter().fold(0, mix)).fill(frame);
    }

    /// Whether a frame holds what must be there.
    pub(super) fn expects(self, direction: Direction, number: u32, frame: &[u8]) -> bool {
        let mut expected = vec![0; frame.len()];
        self.fill(direction, number, &mut expected);
        expected == frame
    }

    /// Payload bytes of a datagram.
    pub(super) fn payload(self) -> usize {
        64 + usize::try_from((self.nonce ^ u64::from(self.number)) % 1_000).unwrap_or(0)
    }
}

impl Greeting {
    pub(super) const SIZE: usize = Hello::SIZE + 4;

    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..Hello::SIZE].copy_from_slice(&self.hello.to_bytes());
        bytes[Hello::SIZE..].copy_from_slice(&self.pod.to_le_bytes());
        bytes
    }

    /// Reads the first bytes; `None` if there are fewer.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let pod = bytes.get(Hello::SIZE..Self::SIZE)?.try_into().ok()?;
        Some(Self { hello: Hello::from_bytes(bytes)?, pod: u32::from_le_bytes(pod) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The soak would not notice that a byte went astray.
    #[test]
    fn what_is_meant_for_anybody_else_differs() {
        let hello = Hello { nonce: 7, service: 3, number: 0 };
        let mut frame = [0; FRAME];
        hello.fill(Direction::Down(5), 9, &mut frame);
        assert!(hello.expects(Direction::Down(5), 9, &frame));
        assert!(!hello.expects(Direction::Down(6), 9, &frame));
        assert!(!hello.expects(Direction::Down(5), 8, &frame));
        assert!(!hello.expects(Direction::Up, 9, &frame));
        assert!(!Hello { service: 4, ..hello }.expects(Direction::Down(5), 9, &frame));
        assert!(!Hello { nonce: 8, ..hello }.expects(Direction::Down(5), 9, &frame));
        frame[FRAME - 1] ^= 1;
        assert!(!hello.expects(Direction::Down(5), 9, &frame));
        let greeting = Greeting { hello, pod: 5 };
        assert_eq!(Greeting::from_bytes(&greeting.to_bytes()), Some(greeting));
    }
}
