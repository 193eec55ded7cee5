/* bcryptprimitives.dll, which wine 8 does not have: the one function that Rust's standard library takes of it. */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE bytes, SIZE_T len)
{
	return RtlGenRandom(bytes, (ULONG)len);
}
