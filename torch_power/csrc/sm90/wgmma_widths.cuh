/* Wgmma<N, T> for the widths below 128 that wgmma.cuh leaves out: products whose width depends on the block (update_state_kernel). */
#pragma once
#include "wgmma.cuh"

namespace sm90 {

#define SM90_LIST_24 SM90_TEN() ", %10, %11"
#define SM90_LIST_40 SM90_TEN() ", " SM90_TEN(1)
#define SM90_LIST_48 SM90_LIST_40 ", %20, %21, %22, %23"
#define SM90_LIST_56 SM90_LIST_48 ", %24, %25, %26, %27"
#define SM90_LIST_72 SM90_TEN() ", " SM90_TEN(1) ", " SM90_TEN(2) ", " SM90_SIX(3)
#define SM90_LIST_80 SM90_TEN() ", " SM90_TEN(1) ", " SM90_TEN(2) ", " SM90_TEN(3)
#define SM90_LIST_88 SM90_LIST_80 ", %40, %41, %42, %43"
#define SM90_LIST_104 SM90_LIST_80 ", " SM90_TEN(4) ", %50, %51"
#define SM90_LIST_112 SM90_LIST_80 ", " SM90_TEN(4) ", " SM90_SIX(5)
#define SM90_LIST_120 SM90_0_59

#define SM90_OUT_24 SM90_ACC8(0), SM90_ACC4(8)
#define SM90_OUT_40 SM90_ACC16(0), SM90_ACC4(16)
#define SM90_OUT_48 SM90_ACC16(0), SM90_ACC8(16)
#define SM90_OUT_56 SM90_OUT_48, SM90_ACC4(24)
#define SM90_OUT_72 SM90_ACC32(0), SM90_ACC4(32)
#define SM90_OUT_80 SM90_ACC32(0), SM90_ACC8(32)
#define SM90_OUT_88 SM90_OUT_80, SM90_ACC4(40)
#define SM90_OUT_104 SM90_OUT_96, SM90_ACC4(48)
#define SM90_OUT_112 SM90_OUT_96, SM90_ACC8(48)
#define SM90_OUT_120 SM90_OUT_112, SM90_ACC4(56)

SM90_WGMMA(24, __half, "f16", "%12", "%13", "%14", "%15", "%16", "%17", "%18")
SM90_WGMMA(40, __half, "f16", "%20", "%21", "%22", "%23", "%24", "%25", "%26")
SM90_WGMMA(48, __half, "f16", "%24", "%25", "%26", "%27", "%28", "%29", "%30")
SM90_WGMMA(56, __half, "f16", "%28", "%29", "%30", "%31", "%32", "%33", "%34")
SM90_WGMMA(72, __half, "f16", "%36", "%37", "%38", "%39", "%40", "%41", "%42")
SM90_WGMMA(80, __half, "f16", "%40", "%41", "%42", "%43", "%44", "%45", "%46")
SM90_WGMMA(88, __half, "f16", "%44", "%45", "%46", "%47", "%48", "%49", "%50")
SM90_WGMMA(104, __half, "f16", "%52", "%53", "%54", "%55", "%56", "%57", "%58")
SM90_WGMMA(112, __half, "f16", "%56", "%57", "%58", "%59", "%60", "%61", "%62")
SM90_WGMMA(120, __half, "f16", "%60", "%61", "%62", "%63", "%64", "%65", "%66")

}  // namespace sm90
