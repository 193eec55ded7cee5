//! X25519 (RFC 7748), by way of the Edwards form of the curve where there is vector code for it: two
//! thirds of the time of x25519-dalek's ladder.
//!
//! The two forms are one group (RFC 7748, section 4.1), so the results are equal bit for bit. Points
//! of the curve's twist, half of all u-coordinates but no honest key, have no Edwards form and take
//! the ladder. The time reveals which of the two a point takes, and with it only that it is
//! no honest key. Both are constant-time in the scalar.

use crate::noise::symmetric::Unauthentic;
use crate::secret::Secret;
use curve25519_dalek::edwards::EdwardsPoint;
use curve25519_dalek::montgomery::MontgomeryPoint;
use subtle::ConstantTimeEq;
use x25519_dalek::{PublicKey as Point, StaticSecret};

/// Whether this processor is one that curve25519-dalek has vector code for. On others the ladder is
/// the faster of the two.
fn has_vector_code() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The public key of a private one.
pub(crate) fn public_key(private: &Secret) -> [u8; 32] {
    Point::from(&StaticSecret::from(**private)).to_bytes()
}

/// A remote public key, precomputed for any number of Diffie-Hellman operations.
pub(crate) struct RemotePoint {
    u: [u8; 32],
    edwards: Option<EdwardsPoint>,
}

impl RemotePoint {
    /// Any 32 bytes are a point.
    pub(crate) fn new(u: &[u8; 32]) -> Self {
        // Of the two points with this u-coordinate either does: so have their multiples.
        let edwards = if has_vector_code() { MontgomeryPoint(*u).to_edwards(0) } else { None };
        Self { u: *u, edwards }
    }

    /// `DH(private, self)`.
    ///
    /// # Errors
    /// If the result is all zeros, which only a point of low order gives.
    pub(crate) fn dh(&self, private: &Secret) -> Result<Secret, Unauthentic> {
        let shared = match self.edwards {
            Some(point) => {
                let product = Secret::new(point.mul_clamped(**private));
                Secret::new(product.to_montgomery().to_bytes())
            }
            None => {
                let private = StaticSecret::from(**private);
                Secret::new(private.diffie_hellman(&Point::from(self.u)).to_bytes())
            }
        };
        if bool::from(shared.ct_eq(&[0; 32])) { Err(Unauthentic) } else { Ok(shared) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_hex(hex: &str) -> [u8; 32] {
        core::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
    }

    fn dh(private: [u8; 32], u: [u8; 32]) -> Option<[u8; 32]> {
        RemotePoint::new(&u).dh(&Secret::new(private)).ok().map(|shared| *shared)
    }

    /// What x25519-dalek's ladder gives.
    fn ladder(private: [u8; 32], u: [u8; 32]) -> Option<[u8; 32]> {
        let shared = StaticSecret::from(private).diffie_hellman(&Point::from(u));
        shared.was_contributory().then(|| shared.to_bytes())
    }

    #[test]
    fn the_vectors_of_rfc_7748() {
        for (private, u, shared) in [
            (
                "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
                "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
                "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
            ),
            (
                "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
                "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
                "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
            ),
        ] {
            assert_eq!(dh(from_hex(private), from_hex(u)), Some(from_hex(shared)));
        }
        // Section 5.2: the result becomes the scalar, the scalar the point, a thousand times.
        let base = core::array::from_fn(|at| if at == 0 { 9 } else { 0 });
        let (mut scalar, mut u) = (base, base);
        for _ in 0..1000 {
            (scalar, u) = (dh(scalar, u).unwrap(), scalar);
        }
        let wanted = "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51";
        assert_eq!(scalar, from_hex(wanted));
    }

    /// 32 pseudo-random bytes.
    fn bytes(number: u32) -> [u8; 32] {
        *crate::noise::symmetric::hash(&[b"x25519", &number.to_le_bytes()]).first_chunk().unwrap()
    }

    #[test]
    fn every_point_gives_what_the_ladder_gives() {
        let mut on_the_curve = 0;
        for number in 0..2000 {
            let (private, u) = (bytes(number), bytes(!number));
            assert_eq!(dh(private, u), ladder(private, u), "{number}");
            on_the_curve += u32::from(RemotePoint::new(&u).edwards.is_some());
        }
        if has_vector_code() {
            assert!((800..1200).contains(&on_the_curve), "{on_the_curve} of 2000");
        }
    }

    #[test]
    fn points_of_low_order_and_ones_not_reduced_are_what_they_are_to_the_ladder() {
        let mut points = vec![
            // Order 8, twice.
            from_hex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
            from_hex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        ];
        // Around 0 and around p = 2^255 - 19, with and without the bit that is to be ignored.
        for low in 0..=255 {
            for (rest, last) in [(0, 0), (0, 0x80), (0xff, 0x7f), (0xff, 0xff)] {
                let mut u = [rest; 32];
                (u[0], u[31]) = (low, last);
                points.push(u);
            }
        }
        let mut refused = 0;
        for (number, u) in (0..).zip(points) {
            let private = bytes(number);
            assert_eq!(dh(private, u), ladder(private, u), "{u:02x?}");
            refused += u32::from(dh(private, u).is_none());
        }
        // 0, 1, -1, each plain, plus p where that fits, and each with the ignored bit; and order 8.
        assert_eq!(refused, 12);
    }
}
